"""From command-line options to results: find SAEs, open stores, run evaluations, print."""
