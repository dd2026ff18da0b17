"""Data for evaluations made from text that every Python installation has: one file per data source."""
