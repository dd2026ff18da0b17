"""Everything that is saved: SAEs, checkpoints, and folders of other libraries."""
