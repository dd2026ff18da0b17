"""Attention as a teacher: who attended to whom in a batch, and how layers of it are mixed."""
