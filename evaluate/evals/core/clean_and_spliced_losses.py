"""The first block of rows: the model's losses when an SAE's reconstruction replaces the residual.

For each batch: the clean pass and the ablations, then for each SAE the layers above its own and the head. All SAEs of a
layer share the clean logits. W windows, T positions, N kept tokens, D residual width, V vocabulary.

The clean pass and its ablations are the same for every SAE, so they are computed once for a store and cached next to
it, in <store>.evals/<cache id>/clean-<settings>/<batch>.safetensors: for each kept token the hidden state after the
final norm, the cross entropy, and the losses under each ablation. Zero ablation removes the residual at every position,
special tokens included, as SAEBench does. All windows then look alike, so only one is run. Mean and resample ablation
replace the same rows as a spliced SAE: by the store's mean, or by the residual at the same position in another window
of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ....cache_schema.disk_and_cloud_files import Files, open_files
from ....harvest.model.fused_on_gpu import is_served
from ...context.context import Context
from ...context.disk_cache import decided_by
from ...context.loaded_sae import LoadedSae, attention_layers_of, layers_of
from ...context.stored_windows import mean_of_rows, ordinary_rows
from ...errors import NotApplicable
from ...model.batches import Windows
from ...model.ce_and_kl import LogitsOf, Losses, compare, logits_of, next_tokens, rows_of_logits
from ...model.smaller_pieces import PieceSize, in_pieces
from .bootstrap import DocumentSums
from .choose_rows import Block, read_block
from .encoding import encode_kept
from .sparsity_and_variance import piece_size

FORMAT = 1
ABLATIONS = ("zero", "mean", "resample")
PARTS = ("ce", "kl", "kl_published")


@dataclass(frozen=True)
class Clean:
    """What the undisturbed model makes of a batch, and its losses under each ablation."""

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
        assert block.first % block.batch_windows == 0, "batches are cached by their number in the split"
        self._first = block.first // block.batch_windows
        self._files: Files | None = files_of(context, layer, block, self._ablations)  # None: nothing can be written

    def measure(self, batch: Windows, number: int, hidden: Sequence[Tensor]) -> tuple[Clean, list[Losses]]:
        """The baselines of batch `number`, from the cache if they are in it, and the losses of other hidden states
        [N, D]. Clean logits are computed once for both."""
        key = f"{self._first + number:05d}.safetensors"
        model, targets = self._context.model, next_tokens(batch.tokens, batch.keep)
        others = [logits_of(model, h) for h in hidden]
        clean = _read(self._files, key, int(batch.keep.sum()), self._ablations, self._context.device)
        if clean is not None:
            return clean, compare(logits_of(model, clean.hidden), others, targets, self._rows)[1]
        clean, losses = self._compute(batch, targets, others)
        if (files := self._files) is not None and not _write(files, key, clean):
            self._context.say(f"the clean pass cannot be cached at {files.url}: it will be recomputed next time")
            self._files = None
        return clean, losses

    def hidden(self, batch: Windows, resid_WTD: Tensor) -> Tensor:
        """[N, D] after the final norm, with this residual at the layer."""
        suffix = self._context.model.suffix
        pieces = in_pieces(len(batch), self._size, lambda a, b: suffix(resid_WTD[a:b], self._layer)[batch.keep[a:b]])
        return torch.cat(list(pieces))

    def _compute(self, batch: Windows, targets_N: Tensor, others: Sequence[LogitsOf]) -> tuple[Clean, list[Losses]]:
        hidden = self.hidden(batch, batch.resid[self._layer])
        ablated = [self._ablated(batch, ablation) for ablation in self._ablations]
        ce, losses = compare(logits_of(self._context.model, hidden), [*ablated, *others], targets_N, self._rows)
        count = len(ablated)
        return Clean(hidden, ce, dict(zip(self._ablations, losses[:count], strict=True))), losses[count:]

    def _ablated(self, batch: Windows, ablation: str) -> LogitsOf:
        """The model's logits at kept tokens after an ablation."""
        if ablation == "zero":
            return self._zero_logits(batch)
        resid = batch.resid[self._layer]
        replacement = self._mean_D if ablation == "mean" else from_other_windows(resid)
        hidden = self.hidden(batch, torch.where(batch.keep[..., None], replacement, resid))
        return logits_of(self._context.model, hidden)

    def _zero_logits(self, batch: Windows) -> LogitsOf:
        """With a residual of zero the model sees nothing but positions."""
        model = self._context.model
        nothing = torch.zeros_like(batch.resid[self._layer][:1])
        hidden_TD = model.suffix(nothing, self._layer)[0]
        if bool((hidden_TD == hidden_TD[:1]).all()):
            logits_1V = model.head(hidden_TD[:1])
            return lambda start, stop: logits_1V.expand(stop - start, -1)
        positions = batch.keep.nonzero()[:, 1]
        return lambda start, stop: model.head(hidden_TD[positions[start:stop]])


def from_other_windows(resid_WTD: Tensor) -> Tensor:
    """For each window the residuals of the one half a batch away; a lone window is shifted by half its length."""
    windows, context, _ = resid_WTD.shape
    return resid_WTD.roll(windows // 2, 0) if windows > 1 else resid_WTD.roll(context // 2, 1)


def files_of(context: Context, layer: int, block: Block, ablations: Sequence[str]) -> Files:
    """Where baselines are cached: a folder for each way of computing them."""
    massive = context.massive(layer)
    left_out = {"massive_norms": massive.multiple} if massive is not None and massive.massive else {}  # out of the mean
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
        device=context.device.type + (", kernels" if is_served(context.device, context.dtype) else ""),
    )
    return open_files(f"{context.store.url.rstrip('/')}.evals/{context.manifest.cache_id}/clean-{name}")


def _read(files: Files | None, key: str, tokens: int, ablations: Sequence[str], device: torch.device) -> Clean | None:
    """A batch's cached baselines, if they are complete."""
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
    """Cache a batch's baselines; False if that failed, because a store on a read-only disk can be evaluated too."""
    tensors = {"hidden": clean.hidden, "ce": clean.ce}
    for name, losses in clean.ablated.items():
        tensors |= {f"{name}.{part}": getattr(losses, part) for part in PARTS}
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    try:
        files.replace(key, data)
    except OSError:
        return False
    return True


@dataclass
class LossSums:
    """Sums over the tokens of the first block for one SAE."""

    documents: DocumentSums = field(default_factory=DocumentSums)
    massive: int = 0  # tokens that keep their own residual in `sae_ordinary`
    published: dict[str, float] = field(default_factory=dict)  # divergences by SAEBench's formula, including NaN

    def add(self, documents_N: np.ndarray, predicts_N: Tensor, clean: Clean, spliced: Losses, ordinary: Losses) -> None:
        """Add one batch: with all its rows spliced, and with massive ones left as they are."""
        runs: dict[str, Losses] = {**clean.ablated, "sae": spliced}
        values = {"tokens": torch.ones_like(clean.ce), "predicting": predicts_N, "ce_clean": clean.ce}
        for name, losses in runs.items():
            values |= {f"ce_{name}": losses.ce, f"kl_{name}": losses.kl}
            self.published[name] = self.published.get(name, 0.0) + float(losses.kl_published.double().sum())
        values |= {"ce_sae_ordinary": ordinary.ce, "kl_sae_ordinary": ordinary.kl}
        of_next = {name: value for name, value in values.items() if name.startswith("ce_")}
        values |= {name: torch.where(predicts_N, ce, 0.0) for name, ce in of_next.items()}
        self.documents.add(documents_N, {name: value.double().cpu().numpy() for name, value in values.items()})

    def totals(self) -> dict[str, float]:
        return {name: float(values.sum()) for name, values in self.documents.table().items()}


def splice_layer(subject: LoadedSae) -> int:
    """The layer whose residual the SAE's output can replace."""
    if len(subject.target_layers) != 1:
        raise NotApplicable(
            f"{subject.name} writes layers {list(subject.target_layers)}: the model's losses are measured only for "
            "SAEs that write one layer"
        )
    return subject.target_layers[0]


def measure_losses(
    context: Context, subjects: Sequence[LoadedSae], block: Block, ablations: Sequence[str] = ABLATIONS
) -> dict[LoadedSae, LossSums]:
    """One pass over the block for all SAEs, each of which must write one layer."""
    found = {subject: LossSums() for subject in subjects}
    if not subjects:
        return found
    layers = {splice_layer(subject) for subject in subjects}
    baselines = {at: Baselines(context, at, block, mean_residual(context, at, block), ablations) for at in layers}
    sizes = {subject: piece_size(context, subject, block.batch_windows) for subject in subjects}
    length = context.manifest.context
    with context.watch.stage("losses of the model", block.windows * length) as advance:
        for number, batch in enumerate(read_block(context, block, layers_of(subjects), attention_layers_of(subjects))):
            for layer, baseline in baselines.items():
                at_layer = {subject: sizes[subject] for subject in subjects if splice_layer(subject) == layer}
                ordinary = {subject: ordinary_rows(context, subject, batch) for subject in at_layer}
                _add_batch(found, at_layer, ordinary, baseline, batch, number)
            advance(len(batch) * length)
    return found


def mean_residual(context: Context, layer: int, block: Block) -> Tensor:
    """The store's mean at a layer [D]; if it does not hold the layer, the mean of the block's own tokens."""
    if layer in context.manifest.layers:
        return mean_of_rows(context, layer)
    total, count = torch.zeros(context.manifest.model.d_model, dtype=torch.float64), 0
    for batch in read_block(context, block, (layer,)):
        total += batch.resid[layer][batch.keep].double().sum(dim=0).cpu()
        count += int(batch.keep.sum())
    return total / max(count, 1)


@torch.inference_mode()
def _add_batch(
    found: Mapping[LoadedSae, LossSums],
    subjects: Mapping[LoadedSae, PieceSize],
    ordinary: Mapping[LoadedSae, Tensor],
    baselines: Baselines,
    batch: Windows,
    number: int,
) -> None:
    """Add a batch for the SAEs of one layer; if it has massive rows, also with these left as they are."""
    hidden = []
    massive = {subject: int((batch.keep & ~ordinary[subject]).sum()) for subject in subjects}
    for subject, size in subjects.items():
        resid = spliced(subject, batch, size)
        hidden.append(baselines.hidden(batch, resid))
        if massive[subject]:
            own = torch.where(ordinary[subject][..., None], resid, batch.resid[splice_layer(subject)])
            hidden.append(baselines.hidden(batch, own))
    clean, losses = baselines.measure(batch, number, hidden)
    assert batch.documents is not None, "windows of a store have documents"
    documents, predicts = batch.documents[batch.keep].cpu().numpy(), next_tokens(batch.tokens, batch.keep) >= 0
    measured = iter(losses)
    for subject in subjects:
        whole = next(measured)
        found[subject].add(documents, predicts, clean, whole, next(measured) if massive[subject] else whole)
        found[subject].massive += massive[subject]


def spliced(subject: LoadedSae, batch: Windows, size: PieceSize) -> Tensor:
    """The residual replaced by the SAE's reconstruction [W, T, D]; special tokens keep their own."""
    resid = batch.resid[splice_layer(subject)].clone()
    pieces = in_pieces(len(batch), size, lambda a, b: encode_kept(subject, batch.slice(a, b)).x_hat)
    resid[batch.keep] = torch.cat(list(pieces)).to(resid.dtype)
    return resid
