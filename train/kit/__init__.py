"""What a variant's file builds on: construction, wrapping a base, guidance by attention."""
