"""
Optimizers around an optimizer.
"""
