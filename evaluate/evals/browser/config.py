"""What a browser is made from: how much is read, and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    windows: int = 2048
    """To be read: of the splits in turn."""
    splits: tuple[str, ...] = ("test", "validation", "train")
    batch_windows: int = 16
    top: int = 10
    """Examples of the highest activations of a latent; then as many as are sampled, and of the lowest."""
    sample: int = 25
    low: int = 5
    neighbours: int = 8
    promoted: int = 10
    """Tokens, and as many suppressed ones."""
    attended: int = 4
    """Earlier tokens that are kept of every token and layer."""
    exports: tuple[str, ...] = ()
    """Forms of others to write too: saedashboard, neuronpedia."""
    together_tokens: int = 16_384
    """Spread over the text, on which firing together is counted."""
