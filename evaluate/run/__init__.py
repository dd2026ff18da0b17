"""From the words of the command line to results: find SAEs, open stores, run evaluations, print."""
