"""Loss terms: pure functions of a view; none knows its weight or the step."""
