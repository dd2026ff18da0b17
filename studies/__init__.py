"""Studies as programs: recipes are in train; runs, tables and verdicts are here."""
