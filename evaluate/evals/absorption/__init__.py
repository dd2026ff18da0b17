"""Feature absorption: a latent for "starts with L" stays silent because a more specific latent fires instead."""
