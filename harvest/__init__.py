"""From a language model and a corpus to a store, in one pass of the model."""
