"""Sparse products with gradients, and what they are made of."""
