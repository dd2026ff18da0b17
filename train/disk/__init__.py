"""Everything that is saved: SAEs, checkpoints, and other libraries' folders."""
