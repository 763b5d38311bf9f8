"""Optimizers whose update needs whole matrices."""
