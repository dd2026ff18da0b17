"""One SAE under evaluation, and how it reads a batch of windows.

W windows, T positions, B rows, D_in and D_out widths, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.massive_activations import is_massive
from ...cache_schema.sites import RESID, key_of, place_of
from ...train.disk.sae_lens_folder import NORM_BOUNDS
from ...train.kit import variant_registry
from ...train.run.init_from_trained_sae import source_of
from ...train.sae.model import SparseAutoencoder
from ...train.sae.side_inputs import Side
from ..errors import NotApplicable, SaeGone
from ..model.batches import Windows
from ..model.smaller_pieces import whole
from .bfloat16_then_float32 import Affine

MOST_CODES = 1 << 27  # elements of dense codes at once: 512 MiB


@dataclass(frozen=True, eq=False)
class LoadedSae:
    """One SAE in raw units, float32, and where it belongs. To save memory, its weights are read when first used."""

    label: str
    folder: Path  # of the SAE
    home: Path  # of its results: the run's folder, or the SAE's own; for one from the Hub, under runs/hub
    run: str | None
    variant: str
    read: Callable[[], SparseAutoencoder]
    d_in: int
    width: int
    num_bytes: int  # of the weights in memory
    config: Mapping[str, Any]  # cfg.json
    layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    cache_id: str | None = None
    cache_url: str | None = None

    @property
    def name(self) -> str:
        """`run/label`, or the label alone."""
        return f"{self.run}/{self.label}" if self.run else self.label

    def make_home(self) -> None:
        """Create the folder for its results, which an SAE from the Hub may lack. A run that was removed during its
        evaluation stays gone: a folder that is not a run would take its name."""
        own = self.folder.resolve()
        if self.home.resolve() in (own, own.parent) and not own.is_dir():
            raise SaeGone(f"{self.folder} was removed or moved during its evaluation: nothing is written for it")
        self.home.mkdir(parents=True, exist_ok=True)

    def require_unchanged(self) -> None:
        """Refuse to write results of weights that have since been replaced: they would pass for the new ones'."""
        if self.folder.is_dir() and source_of(self.folder).sha256 != self.sha256:
            raise SaeGone(f"{self.folder} was overwritten during its evaluation: evaluate it again")

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.config.get("metadata", {})

    @property
    def hooks(self) -> tuple[str, str]:
        """What the SAE reads and writes in its layers: the residual stream, or other hooks."""
        hook = self.metadata.get("hook", RESID)
        return hook, self.metadata.get("target_hook", hook)

    @property
    def bounds(self) -> Mapping[str, float]:
        """For each place, the norm beyond which a row is massive; empty if training took every row."""
        return self.metadata.get(NORM_BOUNDS, self.metadata.get("largest_norms", {}))  # as older SAEs name it

    @cached_property
    def sae(self) -> SparseAutoencoder:
        return self.read()

    @cached_property
    def encoder(self) -> Affine:
        """The encoder's affine map; a bfloat16 copy, where products use one, takes half of `W_enc` more memory."""
        return Affine(self.sae.W_enc.detach(), self.sae.b_enc.detach())

    @cached_property
    def sha256(self) -> str:
        """Digest of its weights and settings on disk."""
        return source_of(self.folder).sha256

    @cached_property
    def needs(self) -> frozenset[str]:
        """Side inputs that the SAE reads at inference: position, attention, ..."""
        return frozenset(self.sae.needs_side)

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers whose attention the SAE reads at inference."""
        if "attention" not in self.needs:
            return ()
        settings = self.metadata["training_architecture_details"]
        return variant_registry.read_settings(self.variant, settings, self.variant).needs().attention_layers

    @property
    def is_single_layer(self) -> bool:
        return len(self.layers) == 1 and self.target_layers == self.layers and self.hooks == (RESID, RESID)

    @property
    def layer(self) -> int:
        if not self.is_single_layer:
            raise NotApplicable(
                f"{self.name} reads layers {list(self.layers)} and writes {list(self.target_layers)}: "
                "this evaluation is for SAEs that read and write one layer"
            )
        return self.layers[0]

    def to(self, device: torch.device) -> None:
        """Move the SAE. `encoder` is rebuilt there: the old one would keep its memory in use."""
        if self.sae.b_dec.device != device:
            vars(self).pop("encoder", None)
            self.sae.to(device)

    def release(self) -> None:
        """Free the weights' memory; they are read again if they are used again."""
        for name in ("encoder", "sae"):
            vars(self).pop(name, None)

    @property
    def together(self) -> int:
        """The fewest windows to encode at once: two for the shuffled-attention control, as each reads the other's."""
        reads = self.needs >= {"attention", "row_of"}
        return 2 if reads and self.metadata.get("training_architecture_details", {}).get("shuffle_attention") else 1

    @torch.inference_mode()
    def encode(self, batch: Windows) -> Tensor:
        """Activations [W, T, F]; zero at special tokens if the SAE needs side inputs, which those lack. The control
        takes windows in pairs, so that batch sizes change no number; the last of an odd batch reads no attention."""
        if 1 < self.together < len(batch):
            return torch.cat([self.encode(batch.slice(start, start + 2)) for start in range(0, len(batch), 2)])
        x_WTD = batch.x(self.layers)
        if not self.needs:
            return self.sae.encode(x_WTD.flatten(0, 1)).unflatten(0, x_WTD.shape[:2])
        x = x_WTD[batch.keep]
        acts_BF = self.sae.encode(x, make_side(batch, self._ordinary(x)))
        acts_WTF = acts_BF.new_zeros(*batch.keep.shape, acts_BF.shape[-1])
        acts_WTF[batch.keep] = acts_BF
        return acts_WTF

    def _ordinary(self, x: Tensor) -> Tensor:
        """bool [B]: rows whose norm is within training's bounds in every layer. A massive row among those that
        attention reads would outweigh all others."""
        keys = [key_of(place_of(self.hooks[0], layer)) for layer in self.layers]
        bounds = x.new_tensor([self.bounds.get(key, math.inf) for key in keys])
        norms = x.unflatten(1, (len(keys), -1)).norm(dim=-1)
        return ~is_massive(norms, bounds).any(dim=1)

    @torch.inference_mode()
    def decode(self, acts_WTF: Tensor) -> Tensor:
        """x_hat [W, T, D_out], without what bypasses the activations."""
        return self.sae.decode(acts_WTF)

    def reconstruct(self, batch: Windows) -> tuple[Tensor, Tensor]:
        acts_WTF = self.encode(batch)
        return acts_WTF, self.sae.skip(batch.x(self.layers), self.decode(acts_WTF))


def layers_of(saes: Iterable[LoadedSae]) -> tuple[int, ...]:
    """Every layer that any of these SAEs reads or writes, in ascending order."""
    return tuple(sorted({layer for sae in saes for layer in (*sae.layers, *sae.target_layers)}))


def attention_layers_of(saes: Iterable[LoadedSae]) -> tuple[int, ...]:
    """Every layer whose attention any of these SAEs reads, in ascending order."""
    return tuple(sorted({layer for sae in saes for layer in sae.attention_layers}))


def batch_size_for(saes: Collection[LoadedSae], context: int, wanted: int) -> int:
    """How many windows to read at once: as many as requested, but no more than the dense codes of the widest SAE allow,
    and whole pairs if a control needs them."""
    return whole(min(wanted, MOST_CODES // (context * max(sae.width for sae in saes))), together(saes))


def together(saes: Iterable[LoadedSae]) -> int:
    """The fewest windows that all of these SAEs can encode at once."""
    return max(sae.together for sae in saes)


def make_side(batch: Windows, is_read: Tensor) -> Side:
    """The side inputs of the rows `x[batch.keep]`, by the names that training uses; `is_read` [B] says which rows
    others may read."""
    window = batch.keep.nonzero()[:, 0]
    row_of = torch.full_like(batch.tokens, -1)
    row_of[batch.keep] = torch.arange(len(window), device=row_of.device).masked_fill(~is_read, -1)
    positions = batch.valid.long().cumsum(dim=1) - 1  # padding on the left takes no position
    inputs: dict[str, Any] = {"token": batch.tokens[batch.keep], "position": positions[batch.keep], "window": window}
    inputs |= {"row_of": row_of, "attention": dict(batch.attention)}
    if batch.documents is not None:
        inputs["document"] = batch.documents[batch.keep]
    return Side(inputs)
