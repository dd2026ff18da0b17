"""Find, load, truncate and hook language models for harvest and evaluation."""
