"""Sparse products with gradients, and their building blocks."""
