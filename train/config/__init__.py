"""From words to records: settings, recipes, and what decides a run."""
