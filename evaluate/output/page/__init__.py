"""A run as one HTML page that needs nothing else: its numbers, its pictures, and what its latents fire on."""

from .write import write_page

__all__ = ["write_page"]
