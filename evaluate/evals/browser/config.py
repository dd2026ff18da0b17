"""What a browser is made from: how much is read, and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    windows: int = 2048
    """Windows to read, from the splits in turn."""
    splits: tuple[str, ...] = ("test", "validation", "train")
    batch_windows: int = 16
    top: int = 10
    """Examples of a latent: the windows of its highest activations."""
    sample: int = 25
    """Tokens drawn from all on which it fires, at most one a window."""
    low: int = 5
    """Windows whose highest activation is lowest."""
    neighbours: int = 8
    promoted: int = 10
    """Promoted tokens, and as many suppressed ones."""
    attended: int = 4
    """Earlier tokens that are kept for every token and layer."""
    exports: tuple[str, ...] = ()
    """Formats of other tools to write too: saedashboard, neuronpedia."""
    together_tokens: int = 16_384
    """Tokens, spread over the text, on which firing together is counted; fewer where many latents fire on each, and the
    page says how many."""
