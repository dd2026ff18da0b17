"""The settings of autointerp, under SAEBench's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    endpoint: str | None = None
    """The address of an OpenAI-compatible server, such as http://localhost:8000/v1. Without one, nothing is asked and
    the evaluation is not run."""
    judge: str | None = None
    """The name there of the model that explains and judges."""
    n_latents: int = 1000
    """Drawn from those that fire often enough; each costs three questions."""
    override_latents: tuple[int, ...] | None = None
    """These latents instead."""
    dead_latent_threshold: int = 15
    """Only latents that fire on more tokens than this are drawn."""
    total_tokens: int = 2_000_000
    """Tokens to read, from the splits in turn."""
    splits: tuple[str, ...] = ("test", "validation", "train")
    batch_windows: int = 16
    buffer: int = 10
    """Tokens of a passage on either side of the one it is chosen for."""
    act_threshold_frac: float = 0.01
    """A token is active above this share of the latent's highest activation."""
    n_top_ex_for_generation: int = 10
    """Passages for the explanation: the latent's highest activations."""
    n_iw_sampled_ex_for_generation: int = 5
    """And others, drawn by their squared activation."""
    n_top_ex_for_scoring: int = 2
    n_iw_sampled_ex_for_scoring: int = 2
    n_random_ex_for_scoring: int = 10
    """Passages in which the latent is silent."""
    max_tokens_in_explanation: int = 30
    thinking_tokens: int = 0
    """More tokens for every answer, for a judge that reasons first."""
    random_seed: int = 42
    requests_at_once: int = 8
    timeout: float = 120.0
    """Seconds to wait for an answer."""

    @property
    def n_top(self) -> int:
        return self.n_top_ex_for_generation + self.n_top_ex_for_scoring

    @property
    def n_weighted(self) -> int:
        return self.n_iw_sampled_ex_for_generation + self.n_iw_sampled_ex_for_scoring

    @property
    def n_scoring(self) -> int:
        return self.n_top_ex_for_scoring + self.n_iw_sampled_ex_for_scoring + self.n_random_ex_for_scoring
