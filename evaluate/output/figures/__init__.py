"""What the plots are made of: the records of runs, one style, and panels that look the same everywhere."""
