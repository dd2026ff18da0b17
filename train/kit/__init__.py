"""The parts that variants are built from: construction, wrapping a base, guidance by attention."""
