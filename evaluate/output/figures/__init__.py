"""The parts of plots: the records of runs, one style, and panels that look the same everywhere."""
