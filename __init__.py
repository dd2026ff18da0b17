"""saemill: harvest a language model's activations once, train every sparse autoencoder from the store.

The repository root is this package. Its rooms are `cache_schema` (the store), `harvest` (model to
store), `train` (store to SAE, never a language model) and `evaluate` (SAE to numbers).
"""

__version__ = "0.1.0"
