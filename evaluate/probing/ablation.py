"""Which latents a probe rests on, and what is left of a text's features without them.

Effect of a latent: how much more it fires on the class, times how far its decoder row moves the probe.
Ablation: x' = decode(acts without the chosen) + (x - decode(acts)). The decoder is linear, so that is
x minus what the chosen latents write, and of a text's mean it is the mean of x minus their mean activations
times their decoder rows: no text is encoded twice, whatever the number of latents and classes.

B texts, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .dense_probe import LinearProbe
from .features import Draw, Features, draw_probe

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
    """The latents with the largest effects, fewer where fewer have any."""
    available = min(count, int((effects_F != 0).sum()), len(effects_F))
    return torch.topk(effects_F, available).indices.numpy()


@dataclass(frozen=True, eq=False)
class Ablatable:
    """Test texts whose latents can be switched off: mean residuals and mean latents of the same texts."""

    resid: Features
    latents: Features
    W_dec: Tensor  # [F, D]

    def without(self, chosen: np.ndarray) -> Features:
        """Mean residuals with the chosen latents switched off."""
        written = self.latents.matrix[:, chosen] @ self.W_dec[torch.from_numpy(chosen)].cpu().numpy()
        ablated = torch.from_numpy(self.resid.matrix.toarray() - written).to(self.resid.dtype)
        return Features.of({name: ablated[span.start : span.stop] for name, span in self.resid.spans.items()})


def effects_of_classes(
    latents: Features,
    probes: Mapping[str, LinearProbe],
    classes: Sequence[str],
    W_dec: Tensor,
    kind: Kind,
    generator: torch.Generator,
    opposites: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Effects on each class's own probe, rows drawn one class after the other."""
    draws = {name: draw_probe(latents.spans, name, generator, (opposites or {}).get(name)) for name in classes}
    return {name: effects(latents, draws[name], probes[name], W_dec, kind) for name in classes}
