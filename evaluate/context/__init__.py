"""What evaluations work with: their context, SAEs, results, and data on disk or on the hub."""
