"""The clean pass of a batch and its ablations: the same for every SAE, so computed once for a store and kept.

Zero ablation removes the residual of every position, special tokens included, as SAEBench does. All
windows then look alike, and one of them is run. Mean and resample ablation replace what a spliced SAE
replaces: by the store's mean, or by the residual at the same position in another window of the batch.

Kept next to the store, in <store>.evals/<cache id>/clean-<settings>/<batch>.safetensors: for each kept
token the hidden state after the final norm, the cross entropy, and the losses of each ablation.
W windows, T positions, N kept tokens, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ....cache_schema.disk_and_cloud_files import Files, open_files
from ...context.context import Context
from ...context.disk_cache import decided_by
from ...model.batches import Windows
from ...model.ce_and_kl import LogitsOf, Losses, compare, logits_of, next_tokens, rows_of_logits
from ...model.smaller_pieces import PieceSize, in_pieces
from .choose_rows import Block

FORMAT = 1
ABLATIONS = ("zero", "mean", "resample")
PARTS = ("ce", "kl", "kl_published")


@dataclass(frozen=True)
class Clean:
    """A batch as the model itself continues it, and as it does after each ablation."""

    hidden: Tensor  # [N, D] in the model's dtype
    ce: Tensor  # [N]
    ablated: Mapping[str, Losses]


class Baselines:
    """Clean passes and ablations at one layer of one store."""

    def __init__(
        self, context: Context, layer: int, block: Block, mean_D: Tensor, ablations: Sequence[str] = ABLATIONS
    ) -> None:
        self._context, self._layer, self._ablations = context, layer, tuple(ablations)
        self._mean_D = mean_D.to(context.device, context.model.dtype)
        self._size = PieceSize(block.batch_windows, "windows", context.say)
        self._rows = rows_of_logits(context.model, context.say)
        assert block.first % block.batch_windows == 0, "a batch is kept by its number in the split"
        self._first = block.first // block.batch_windows
        self._files = files_of(context, layer, block, self._ablations)

    def measure(self, batch: Windows, number: int, hidden: Sequence[Tensor]) -> tuple[Clean, list[Losses]]:
        """The baselines of batch `number`, and the losses that follow from each of other hidden states [N, D].

        Baselines are read if they were kept, or else computed and kept; clean logits are computed once for both.
        """
        key = f"{self._first + number:05d}.safetensors"
        model, targets = self._context.model, next_tokens(batch.tokens, batch.keep)
        others = [logits_of(model, h) for h in hidden]
        clean = _read(self._files, key, int(batch.keep.sum()), self._ablations, self._context.device)
        if clean is not None:
            return clean, compare(logits_of(model, clean.hidden), others, targets, self._rows)[1]
        made, losses = self._make(batch, targets, others)
        self._keep(key, made)
        return made, losses

    def hidden(self, batch: Windows, resid_WTD: Tensor) -> Tensor:
        """[N, D] after the final norm, with this residual at the layer."""
        suffix = self._context.model.suffix
        pieces = in_pieces(len(batch), self._size, lambda a, b: suffix(resid_WTD[a:b], self._layer)[batch.keep[a:b]])
        return torch.cat(list(pieces))

    def _make(self, batch: Windows, targets_N: Tensor, others: Sequence[LogitsOf]) -> tuple[Clean, list[Losses]]:
        hidden = self.hidden(batch, batch.resid[self._layer])
        ablated = [self._ablated(batch, ablation) for ablation in self._ablations]
        ce, losses = compare(logits_of(self._context.model, hidden), [*ablated, *others], targets_N, self._rows)
        count = len(ablated)
        return Clean(hidden, ce, dict(zip(self._ablations, losses[:count], strict=True))), losses[count:]

    def _keep(self, key: str, made: Clean) -> None:
        if self._files is not None and not _write(self._files, key, made):
            self._context.say(
                f"the clean pass cannot be kept at {self._files.url}: it will be computed again next time"
            )
            self._files = None

    def _ablated(self, batch: Windows, ablation: str) -> LogitsOf:
        """The model's logits at kept tokens after an ablation."""
        if ablation == "zero":
            return self._zero_logits(batch)
        resid = batch.resid[self._layer]
        instead = self._mean_D if ablation == "mean" else elsewhere(resid)
        hidden = self.hidden(batch, torch.where(batch.keep[..., None], instead, resid))
        return logits_of(self._context.model, hidden)

    def _zero_logits(self, batch: Windows) -> LogitsOf:
        """With a residual of zero the model sees positions and nothing else."""
        model = self._context.model
        nothing = torch.zeros_like(batch.resid[self._layer][:1])
        hidden_TD = model.suffix(nothing, self._layer)[0]
        if bool((hidden_TD == hidden_TD[:1]).all()):
            logits_1V = model.head(hidden_TD[:1])
            return lambda start, stop: logits_1V.expand(stop - start, -1)
        positions = batch.keep.nonzero()[:, 1]
        return lambda start, stop: model.head(hidden_TD[positions[start:stop]])


def elsewhere(resid_WTD: Tensor) -> Tensor:
    """For each window another one's residuals, half a batch away; a lone window is shifted by half of itself."""
    windows, context, _ = resid_WTD.shape
    return resid_WTD.roll(windows // 2, 0) if windows > 1 else resid_WTD.roll(context // 2, 1)


def files_of(context: Context, layer: int, block: Block, ablations: Sequence[str]) -> Files | None:
    """Where baselines are kept: a folder for each way of computing them; nowhere if the model is unknown."""
    if context.model_identity is None:
        return None
    massive = context.massive(layer)
    left_out = {"massive_norms": massive.multiple} if massive is not None and massive.massive else {}  # of the mean
    name = decided_by(
        **left_out,
        format=FORMAT,
        model=context.model_identity,
        layer=layer,
        split=block.split,
        batch_windows=block.batch_windows,
        mean_of_batches=None if layer in context.manifest.layers else [block.first, block.batches],
        dtype=str(context.dtype),
        ablations=list(ablations),
        from_tokens=context.from_tokens,
        device=context.device.type,
    )
    return open_files(f"{context.store.url.rstrip('/')}.evals/{context.manifest.cache_id}/clean-{name}")


def _read(files: Files | None, key: str, tokens: int, ablations: Sequence[str], device: torch.device) -> Clean | None:
    """What is kept, if it is complete."""
    if files is None:
        return None
    try:
        found = {name: tensor.to(device) for name, tensor in load(files.read(key)).items()}
        ablated = {name: Losses(*(found[f"{name}.{part}"] for part in PARTS)) for name in ablations}
        clean = Clean(found["hidden"], found["ce"], ablated)
    except (KeyError, OSError, SafetensorError):
        return None
    return clean if len(clean.hidden) == tokens else None


def _write(files: Files, key: str, clean: Clean) -> bool:
    """Keep it, and return whether that worked: a store on a read-only disk can be evaluated too."""
    tensors = {"hidden": clean.hidden, "ce": clean.ce}
    for name, losses in clean.ablated.items():
        tensors |= {f"{name}.{part}": getattr(losses, part) for part in PARTS}
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    try:
        files.replace(key, data)
    except OSError:
        return False
    return True
