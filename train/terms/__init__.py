"""What a variant is trained with: loss terms, pure functions of a view; and constraints on weights and gradients."""
