"""The autoencoder: weights, gates, codes, and what the terms of a step see of a batch."""
