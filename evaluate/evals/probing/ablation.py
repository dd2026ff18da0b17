"""Which latents a probe relies on, and what probes say about texts without them.

Effect of a latent: how much more it fires on the class, times how far its decoder row moves the probe.
Ablation: x' = decode(acts without the chosen) + (x - decode(acts)). The decoder is linear, so that is x
minus what the chosen latents write; a probe is linear too, so its logit of a text's mean falls by the
text's mean activations times the probe's logits of the decoder rows. No text is encoded twice and no
ablated activation is ever made, whatever the number of latents, classes and probes.

N texts, P probes, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .features import Draw, Features
from .fit_probes import LinearProbe

Kind = Literal["absolute", "positive"]
"""scr takes the size of an effect; tpp takes effects of latents that fire more on the class, with their sign."""


@torch.no_grad()
def effects(latents: Features, draw: Draw, probe: LinearProbe, W_dec: Tensor, kind: Kind) -> Tensor:
    """float32 [F], from training texts."""
    difference_F = latents.mean(draw.rows[draw.labels == 1]) - latents.mean(draw.rows[draw.labels == 0])
    direction_F = (probe.weight.cpu().float() @ W_dec.cpu().float().T).squeeze(0)
    if kind == "absolute":
        return (difference_F * direction_F).abs()
    return difference_F.clamp(min=0) * direction_F


def top_effects(effects_F: Tensor, count: int) -> np.ndarray:
    """The latents with the largest effects; fewer if fewer have any."""
    available = min(count, int((effects_F != 0).sum()), len(effects_F))
    return torch.topk(effects_F, available).indices.numpy()


@dataclass(frozen=True, eq=False)
class Logits:
    """What every probe says about every test text."""

    table: np.ndarray  # float64 [N, P]
    probes: Sequence[str]
    spans: Mapping[str, range]

    def accuracy(self, probe: str, draw: Draw) -> float:
        says_yes = self.table[draw.rows, self.probes.index(probe)] > 0
        return float((says_yes == draw.labels).mean())


@dataclass(frozen=True, eq=False)
class Ablatable:
    """Test texts whose latents can be switched off, and the probes that read them."""

    resid: Features
    latents: Features  # of the same texts
    W_dec: Tensor  # [F, D]
    probes: Mapping[str, LinearProbe]

    def logits(self, off: np.ndarray | None = None) -> Logits:
        """What the probes say when the latents `off` are switched off."""
        table = self._untouched
        if off is not None:
            W_dec = self.W_dec[torch.from_numpy(off)].double().cpu().numpy()
            table = table - self.latents.matrix[:, off] @ (W_dec @ self._weights)
        return Logits(table, list(self.probes), self.resid.spans)

    @cached_property
    def _untouched(self) -> np.ndarray:
        """float64 [N, P]: what the probes say about the texts as they are."""
        return self.resid.matrix @ self._weights + self._biases

    @cached_property
    def _weights(self) -> np.ndarray:
        """float64 [D, P]"""
        return torch.cat([probe.weight for probe in self.probes.values()]).double().cpu().numpy().T

    @cached_property
    def _biases(self) -> np.ndarray:
        return torch.cat([probe.bias for probe in self.probes.values()]).double().cpu().numpy()
