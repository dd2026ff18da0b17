"""An evaluation in several files."""
