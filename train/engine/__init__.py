"""Training: assemblies, schedules, the optimiser, one step, and SAEs side by side."""
