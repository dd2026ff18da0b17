"""What every evaluation is given and may use: context, SAEs, results, data on disk or on the hub."""
