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
    """Tokens drawn from all that it fires on, at most one per window."""
    low: int = 5
    """Windows with the lowest peaks."""
    neighbours: int = 8
    promoted: int = 10
    """Promoted tokens, and the same number of suppressed ones."""
    attended: int = 4
    """Earlier tokens that are kept for every token and layer."""
    exports: tuple[str, ...] = ()
    """Other tools' formats to write as well: saedashboard, neuronpedia."""
    together_tokens: int = 16_384
    """Tokens, spread over the text, on which firing together is counted; fewer where many latents fire on each, and the
    page says how many."""
