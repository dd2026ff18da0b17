"""What a variant's file leans on: building, wrapping a base, guidance by attention."""
