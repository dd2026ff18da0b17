"""The autoencoder: weights, gates, sparse kernels, and its form on disk."""
