"""Where documents come from. `source` says what a corpus is; every other file is one, or opens it."""
