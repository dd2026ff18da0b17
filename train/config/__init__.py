"""From command-line words to records: settings, recipes, and the configuration of a run."""
