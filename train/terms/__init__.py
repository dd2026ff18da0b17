"""Loss terms, which are pure functions of a view, and constraints on weights and gradients."""
