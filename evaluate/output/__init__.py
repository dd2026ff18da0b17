"""Plots and pages of runs and results."""
