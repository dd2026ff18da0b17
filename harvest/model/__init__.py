"""Language models as harvest and evaluation need them: found, loaded, truncated and hooked."""
