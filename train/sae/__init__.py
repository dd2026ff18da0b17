"""The autoencoder: weights, gates, codes, and the view of a batch that the terms of a step get."""
