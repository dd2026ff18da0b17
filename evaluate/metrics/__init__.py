"""What the evaluations measure: pure functions of codes, decoders, positions and attention."""
