"""Attention as a teacher: which tokens attend to which in a batch, and how layers of attention are mixed."""
