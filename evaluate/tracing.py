"""What becomes of the model's predictions when its residual is replaced: KL and loss, from suffix passes.

1. The clean pass: the suffix from the residual itself, once for a batch.
2. A replaced pass: special tokens keep their residual, all others get what they are given.
3. Both through the head in chunks of rows; nothing of size windows x vocabulary lives longer.

W windows, T positions, D residual width, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from .lm import LanguageModel
from .scene import Scene
from .windows import Windows

CHUNK_ELEMENTS = 1 << 25  # float32 logits at a time: 128 MiB


@dataclass(frozen=True)
class Effect:
    """Sums over tokens; those of two batches add up."""

    kl_sum: float = 0.0
    loss_sum: float = 0.0
    tokens: int = 0
    predicted: int = 0

    def __add__(self, other: Effect) -> Effect:
        return Effect(
            self.kl_sum + other.kl_sum,
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.predicted + other.predicted,
        )

    @property
    def kl(self) -> float:
        """Mean KL from the clean predictions, in nats a token."""
        return self.kl_sum / max(self.tokens, 1)

    @property
    def loss(self) -> float:
        """Mean cross entropy of the next token."""
        return self.loss_sum / max(self.predicted, 1)


class Tracer:
    """Replaces the residual of one batch at one layer, as often as one likes, against one clean pass."""

    def __init__(self, model: LanguageModel, batch: Windows, layer: int, mean_D: Tensor) -> None:
        self._model, self._batch, self._layer, self._mean = model, batch, layer, mean_D
        self._resid = batch.resid[layer].to(model.dtype)
        self._clean = model.suffix(self._resid, layer, batch.valid)

    @cached_property
    def clean(self) -> Effect:
        """The model as it is: no KL, its own loss."""
        return self._compare(self._clean)

    @cached_property
    def mean_ablated(self) -> Effect:
        """With the mean residual at every token."""
        return self.replaced(self._mean.expand_as(self._resid))

    def replaced(self, x_hat_WTD: Tensor) -> Effect:
        """With another residual at every token that is not special."""
        given = torch.where(self._batch.keep[:, :, None], x_hat_WTD.to(self._resid.dtype), self._resid)
        return self._compare(self._model.suffix(given, self._layer, self._batch.valid))

    @torch.inference_mode()
    def _compare(self, hidden_WTD: Tensor) -> Effect:
        """KL at kept tokens; loss where the next token is kept."""
        keep = self._batch.keep
        target = functional.pad(self._batch.tokens[:, 1:], (0, 1))
        predicts = functional.pad(keep[:, 1:], (0, 1)) & self._batch.valid
        rows = (keep | predicts).view(-1).nonzero().view(-1)
        effect = Effect()
        vocabulary = self._model.facts.vocab_size
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // vocabulary)):
            clean, found = (
                functional.log_softmax(self._model.head(hidden.flatten(0, 1)[chunk]).float(), dim=-1)
                for hidden in (self._clean, hidden_WTD)
            )
            kl = (clean.exp() * (clean - found)).sum(-1)[keep.view(-1)[chunk]]
            loss = -found.gather(1, target.view(-1)[chunk, None]).squeeze(1)[predicts.view(-1)[chunk]]
            effect += Effect(float(kl.double().sum()), float(loss.double().sum()), len(kl), len(loss))
        return effect


def make_tracers(scene: Scene, batch: Windows, layers: Sequence[int]) -> dict[int, Tracer]:
    """A tracer for each layer, so that all SAEs of a layer share its clean pass."""
    moments = {layer: scene.store.moments(layer) for layer in set(layers)}
    means = {layer: torch.as_tensor(part.mean, dtype=torch.float32) for layer, part in moments.items()}
    return {layer: Tracer(scene.model, batch, layer, mean.to(scene.device)) for layer, mean in means.items()}
