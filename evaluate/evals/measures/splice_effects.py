"""How the model's predictions change when its residual is replaced: KL and loss, from the layers above alone.

Special tokens and massive rows keep their residual and do not count; all others get the replacement. The clean pass of
a batch runs once for all replacements. W windows, T positions, D residual width, N kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...context.context import Context
from ...context.loaded_sae import LoadedSae
from ...context.stored_windows import mean_of_rows, ordinary_rows
from ...model.batches import Sums, Windows
from ...model.ce_and_kl import compare, logits_of, next_tokens, rows_of_logits
from ...model.prefix_suffix import LanguageModel
from ...model.smaller_pieces import PieceSize

CLEAN, MEAN = "clean", "mean"


@dataclass(frozen=True)
class Effect(Sums):
    """Sums over tokens."""

    kl_sum: float = 0.0
    loss_sum: float = 0.0
    tokens: int = 0
    predicting: int = 0

    @staticmethod
    def of(kl_N: Tensor, loss_N: Tensor, targets_N: Tensor) -> Effect:
        losses = loss_N[targets_N >= 0].double()
        return Effect(float(kl_N.double().sum()), float(losses.sum()), len(kl_N), len(losses))

    @property
    def kl(self) -> float:
        """Mean KL from the clean predictions, in nats per token."""
        return self.kl_sum / max(self.tokens, 1)

    @property
    def loss(self) -> float:
        """Mean cross entropy of the next token."""
        return self.loss_sum / max(self.predicting, 1)


def effects_of(
    model: LanguageModel, clean_ND: Tensor, replaced: Mapping[str, Tensor], targets_N: Tensor, rows: PieceSize
) -> dict[str, Effect]:
    """The effect of each [N, D] after the final norm, and of the model as it is."""
    clean, *others = (logits_of(model, hidden_ND) for hidden_ND in (clean_ND, *replaced.values()))
    loss_N, losses = compare(clean, others, targets_N, rows)
    found = {name: Effect.of(part.kl, part.ce, targets_N) for name, part in zip(replaced, losses, strict=True)}
    return found | {CLEAN: Effect.of(torch.zeros_like(loss_N), loss_N, targets_N)}


class Tracer:
    """Replaces the residual of one batch at one layer, any number of times, against one clean pass."""

    def __init__(self, model: LanguageModel, batch: Windows, layer: int, mean_D: Tensor, rows: PieceSize) -> None:
        self._model, self._batch, self._layer, self._rows = model, batch, layer, rows
        self._resid = batch.resid[layer].to(model.dtype)
        self._clean = self._hidden(self._resid)
        self.baselines = self.effects({MEAN: lambda: mean_D.expand_as(self._resid)})

    def effects(self, replaced: Mapping[str, Callable[[], Tensor]]) -> dict[str, Effect]:
        """The effect of each residual [W, T, D], computed when its turn comes, and of the model as it is."""
        keep = self._batch.keep[:, :, None]
        hidden = {
            name: self._hidden(torch.where(keep, x_hat().to(self._resid), self._resid))
            for name, x_hat in replaced.items()
        }
        targets = next_tokens(self._batch.tokens, self._batch.keep)
        return effects_of(self._model, self._clean, hidden, targets, self._rows)

    def _hidden(self, resid_WTD: Tensor) -> Tensor:
        """[N, D] after the final norm."""
        return self._model.suffix(resid_WTD, self._layer, self._batch.valid)[self._batch.keep]


class Tracers:
    """Makes tracers for one batch after another, one for each layer: its SAEs share the clean pass."""

    def __init__(self, context: Context, subjects: Iterable[LoadedSae]) -> None:
        self._context, self._rows = context, rows_of_logits(context.model, context.say)
        self._at = {subject.layer: subject for subject in subjects}
        self._means = {layer: mean_of_rows(context, layer).to(context.device, torch.float32) for layer in self._at}

    def of(self, batch: Windows) -> dict[int, Tracer]:
        """The tracers of a batch, by layer."""
        tracers = {}
        for layer, subject in self._at.items():
            ordinary = replace(batch, keep=ordinary_rows(self._context, subject, batch))
            tracers[layer] = Tracer(self._context.model, ordinary, layer, self._means[layer], self._rows)
        return tracers
