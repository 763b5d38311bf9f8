"""Pretraining experiments as a series of stages, each on its own data mixture."""
