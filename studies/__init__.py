"""Studies as programs: the recipes are train's, runs, tables and verdicts are here."""
