"""Optimizers whose update of a coordinate needs no other coordinate."""
