"""Optimisers, learning rates, clipping and averages of the weights."""
