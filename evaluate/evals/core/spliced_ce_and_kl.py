"""The first block of rows: what the model loses when an SAE's reconstruction takes the residual's place.

For each batch: the clean pass and the ablations from where they are kept, then for each SAE the layers
above its own and the head. All SAEs of a layer share the clean logits. N kept tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...context.context import Context
from ...context.loaded_sae import LoadedSae, attention_layers_of, layers_of
from ...context.stored_windows import mean_of_rows, ordinary_rows
from ...errors import NotApplicable
from ...model.batches import Windows
from ...model.ce_and_kl import Losses, next_tokens
from ...model.smaller_pieces import PieceSize, in_pieces
from .bootstrap import DocumentSums
from .choose_rows import Block, read_block
from .clean_pass import ABLATIONS, Baselines, Clean
from .encoding import encode_kept
from .sparsity_and_variance import piece_size


@dataclass
class LossSums:
    """Sums over the tokens of the first block for one SAE."""

    documents: DocumentSums = field(default_factory=DocumentSums)
    massive: int = 0  # tokens that keep their own residual in `sae_ordinary`
    published: dict[str, float] = field(default_factory=dict)  # divergences by SAEBench's formula, NaN and all

    def add(self, documents_N: np.ndarray, predicts_N: Tensor, clean: Clean, spliced: Losses, ordinary: Losses) -> None:
        """Add one batch: with all its rows spliced, and with massive ones left as they are."""
        runs: dict[str, Losses] = {**clean.ablated, "sae": spliced}
        values: dict[str, Tensor] = {
            "tokens": torch.ones_like(clean.ce),
            "predicting": predicts_N,
            "ce_clean": clean.ce,
        }
        for name, losses in runs.items():
            values |= {f"ce_{name}": losses.ce, f"kl_{name}": losses.kl}
            total = float(losses.kl_published.double().sum())
            self.published[name] = self.published.get(name, 0.0) + total
        values |= {"ce_sae_ordinary": ordinary.ce, "kl_sae_ordinary": ordinary.kl}
        of_next = {name: value for name, value in values.items() if name.startswith("ce_")}
        values |= {name: torch.where(predicts_N, ce, 0.0) for name, ce in of_next.items()}
        self.documents.add(documents_N, {name: value.double().cpu().numpy() for name, value in values.items()})

    def totals(self) -> dict[str, float]:
        """The sums over all documents."""
        return {name: float(values.sum()) for name, values in self.documents.table().items()}


def splice_layer(subject: LoadedSae) -> int:
    """The layer whose residual the SAE's output can replace."""
    if len(subject.target_layers) != 1:
        raise NotApplicable(
            f"{subject.name} writes layers {list(subject.target_layers)}: the losses of the model are about "
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
    """The store's mean at a layer [D]; if it does not hold the layer, that of the block's own tokens."""
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
    """The residual with the SAE's reconstruction in its place [W, T, D]; special tokens keep their own."""
    resid = batch.resid[splice_layer(subject)].clone()
    pieces = in_pieces(len(batch), size, lambda a, b: encode_kept(subject, batch.slice(a, b)).x_hat)
    resid[batch.keep] = torch.cat(list(pieces)).to(resid.dtype)
    return resid
