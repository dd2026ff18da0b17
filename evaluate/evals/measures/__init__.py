"""Pure functions that evaluations share: tensors in, numbers out."""
