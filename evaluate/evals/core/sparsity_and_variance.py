"""The second block of rows: SAEBench's measures of sparsity and reconstruction, from sums; no model is needed.

Explained variance is also computed correctly. Means are over all tokens, except where SAEBench takes them over batches;
where it divides by the tokens of a batch, the batch size is that of the settings.

Sums are float64; all SAEs share each batch. W windows, T positions, N kept tokens, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...context.context import Context
from ...context.loaded_sae import LoadedSae, attention_layers_of, layers_of
from ...context.stored_windows import ordinary_rows
from ...model.batches import Sums, Windows
from ...model.smaller_pieces import PieceSize, in_pieces
from .bootstrap import DocumentSums
from .choose_rows import Block, read_block
from .encoding import encode_kept

NAN = float("nan")
SMALL_NORM = 1e-4  # below this SAEBench divides by one


@dataclass(frozen=True)
class Tokens:
    """Values of each kept token: float32 [N]."""

    l0: Tensor
    l1: Tensor
    square: Tensor  # ||x||^2
    square_hat: Tensor  # ||x_hat||^2
    dot: Tensor  # x . x_hat
    error: Tensor  # ||x - x_hat||^2
    spread: Tensor  # ||x - mean of the batch||^2

    @staticmethod
    def concat(parts: Sequence[Tokens]) -> Tokens:
        return Tokens(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Tokens)))

    def where(self, mask_N: Tensor) -> Tokens:
        return Tokens(*(getattr(self, field.name)[mask_N] for field in fields(Tokens)))

    @property
    def cosine(self) -> Tensor:
        """NaN where a reconstruction is zero."""
        return self.dot / (self.square.sqrt() * self.square_hat.sqrt())

    @property
    def norm_ratio(self) -> Tensor:
        norm = self.square.sqrt()
        return self.square_hat.sqrt() / torch.where(norm < SMALL_NORM, 1.0, norm)


@dataclass(frozen=True, eq=False)
class Firing(Sums):
    """In how many tokens and windows each latent fires: int64 [F]."""

    tokens: Tensor
    windows: Tensor
    total_tokens: int

    @staticmethod
    def none(width: int, device: torch.device) -> Firing:
        nothing = torch.zeros(width, dtype=torch.int64, device=device)
        return Firing(nothing, nothing, 0)

    @property
    def density(self) -> Tensor:
        return (self.tokens / self.total_tokens).cpu()

    @property
    def tokens_per_window(self) -> Tensor:
        """`consistent_activation_heuristic`: NaN for a latent that never fired."""
        return (self.tokens / self.windows).cpu()


@dataclass
class Tally:
    """Sums over batches."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    batch_means: dict[str, list[float]] = field(default_factory=dict)
    x_sum: np.ndarray = field(default_factory=lambda: np.zeros(1))  # [D]
    mean_squares: list[float] = field(default_factory=list)  # by batch, over tokens and dimensions of x^2

    def add(self, tokens: Tokens, x_sum_D: Tensor) -> None:
        count, width = len(tokens.l0), len(x_sum_D)
        double = {f.name: getattr(tokens, f.name).double() for f in fields(Tokens)}
        values = {
            **double,
            "norm": double["square"].sqrt(),
            "norm_hat": double["square_hat"].sqrt(),
            "norm_ratio": tokens.norm_ratio.double(),
            "cosine": tokens.cosine.double(),
            "mse": double["error"] / count,
            "explained_legacy": 1 - double["error"] / double["spread"],
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum())
        for name in ("error", "square", "square_hat", "dot"):
            self.batch_means.setdefault(name, []).append(float(double[name].mean()))
        self.mean_squares.append(float(double["square"].mean()) / width)
        self.x_sum = self.x_sum + x_sum_D.double().cpu().numpy()
        self.tokens += count

    def mean(self, name: str) -> float:
        return self.sums[name] / self.tokens if self.tokens else NAN

    @property
    def explained_variance_published(self) -> float:
        """SAEBench 0.6.0: subtracts the square of a mean square instead of the squared norm of the mean."""
        error, square = (float(np.mean(self.batch_means[name])) for name in ("error", "square"))
        return 1 - ratio(error, square - float(np.mean(self.mean_squares)) ** 2)

    @property
    def explained_variance(self) -> float:
        """1 - E||x - x_hat||^2 / E||x - mean||^2 over all tokens together."""
        return explained_variance_of({**self.sums, "tokens": self.tokens}, self.square_of_mean)

    @property
    def square_of_mean(self) -> float:
        mean = self.x_sum / max(self.tokens, 1)
        return float(mean @ mean)

    @property
    def reconstruction_bias(self) -> float:
        """Mean over batches of E||x_hat||^2 / E[x . x_hat]."""
        hats, dots = np.array(self.batch_means["square_hat"]), np.array(self.batch_means["dot"])
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.mean(hats / dots))


def summarise_density(density_F: Tensor) -> dict[str, float]:
    """SAEBench's `misc_metrics` about how often latents fire."""
    density = density_F.double()
    total = float(density.sum())

    def share(limit: float) -> float:
        return float(density[density > limit].sum()) / total if total > 0 else 0.0

    return {
        "freq_over_1_percent": float((density > 0.01).double().mean()),
        "freq_over_10_percent": float((density > 0.1).double().mean()),
        "normalized_freq_over_1_percent": share(0.01),
        "normalized_freq_over_10_percent": share(0.1),
        "frac_alive": float((density > 0).double().mean()),
    }


def explained_variance_of(sums: Mapping[str, Any], square_of_mean: float) -> Any:
    """The explained variance; for resampled documents too, around the mean of all documents."""
    return 1 - ratio(sums["error"], sums["square"] - sums["tokens"] * square_of_mean)


def ratio(numerator: Any, denominator: Any) -> Any:
    """The quotient: NaN for a number over 0; for arrays, numpy's result."""
    return numerator / denominator if isinstance(denominator, np.ndarray) or denominator != 0 else NAN


PIECE_BYTES = 1 << 27  # of activations at once


@dataclass
class Sparsity:
    """One SAE's sums over the second block."""

    firing: Firing
    tally: Tally = field(default_factory=Tally)  # over all tokens, as in SAEBench
    ordinary: Tally = field(default_factory=Tally)  # over those that are not massive, like `documents`
    documents: DocumentSums = field(default_factory=DocumentSums)

    def add(self, tokens: Tokens, x_ND: Tensor, batch: Windows, ordinary_WT: Tensor) -> None:
        self.tally.add(tokens, x_ND.double().sum(dim=0))
        is_ordinary = ordinary_WT[batch.keep]
        tokens = tokens.where(is_ordinary)
        self.ordinary.add(tokens, x_ND[is_ordinary].double().sum(dim=0))
        assert batch.documents is not None, "windows of a store have documents"
        values = {"tokens": torch.ones_like(tokens.l0), "l0": tokens.l0, "cosine": tokens.cosine}
        values |= {"error": tokens.error, "square": tokens.square}
        self.documents.add(
            batch.documents[ordinary_WT].cpu().numpy(), {k: v.double().cpu().numpy() for k, v in values.items()}
        )


def measure_sparsity(context: Context, subjects: Sequence[LoadedSae], block: Block) -> dict[LoadedSae, Sparsity]:
    """One pass over the block for all SAEs."""
    found = {subject: Sparsity(Firing.none(subject.width, context.device)) for subject in subjects}
    sizes = {subject: piece_size(context, subject, block.batch_windows) for subject in subjects}
    length = context.manifest.context
    with context.watch.stage("sparsity and variance", block.windows * length) as advance:
        for batch in read_block(context, block, layers_of(subjects), attention_layers_of(subjects)):
            for subject, sparsity in found.items():
                ordinary_WT = ordinary_rows(context, subject, batch)
                _add_batch(sparsity, subject, batch, ordinary_WT, sizes[subject])
            advance(len(batch) * length)
    return found


def piece_size(context: Context, subject: LoadedSae, batch_windows: int) -> PieceSize:
    """As many windows as `PIECE_BYTES` has room for."""
    room = PIECE_BYTES // (4 * context.manifest.context * subject.width)
    return PieceSize(min(room, batch_windows), "windows", context.say, subject.together)


def _dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    return (a_ND * b_ND).sum(dim=-1)


@torch.inference_mode()
def _add_batch(sparsity: Sparsity, subject: LoadedSae, batch: Windows, ordinary_WT: Tensor, size: PieceSize) -> None:
    x_WTD = batch.x(subject.target_layers)
    x_ND = x_WTD[batch.keep]
    mean_D = (x_ND.double().sum(dim=0) / batch.keep.sum().clamp_min(1)).float()

    def work(start: int, stop: int) -> tuple[Tokens, Tensor, Tensor]:
        piece = batch.slice(start, stop)
        encoded, x = encode_kept(subject, piece), x_WTD[start:stop][piece.keep]
        tokens = Tokens(
            l0=encoded.l0,
            l1=encoded.l1,
            square=_dot(x, x),
            square_hat=_dot(encoded.x_hat, encoded.x_hat),
            dot=_dot(x, encoded.x_hat),
            error=(x - encoded.x_hat).square().sum(dim=-1),
            spread=(x - mean_D).square().sum(dim=-1),
        )
        window = piece.keep.nonzero()[:, 0]
        return tokens, encoded.fired(), encoded.fired_in(window, len(piece))

    pieces = list(in_pieces(len(batch), size, work))
    for tokens, in_tokens, in_windows in pieces:
        sparsity.firing += Firing(in_tokens, in_windows, len(tokens.l0))
    sparsity.add(Tokens.concat([piece[0] for piece in pieces]), x_ND, batch, ordinary_WT)
