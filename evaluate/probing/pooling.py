"""Activations averaged over each text: the model reads every text once, and every SAE encodes that.

1. Special tokens (BOS, EOS, padding) are set to zero in the residual.
2. A position is valid when its residual does not sum to zero; features are averaged over valid positions.
3. An SAE encodes all positions, zeroed ones too. `latents` leave those out. `leaky` keeps them, divided by the
   number of valid ones: the protocols that ablate latents never mask them again, so a latent that fires on
   a zero vector counts once for every padding token.

W texts of a batch, T positions, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix, vstack
from torch import Tensor

from ...cache_schema import AttentionSpec
from ..feed import text_batches
from ..lm import LanguageModel
from ..scene import Scene
from ..subject import Subject
from ..windows import Windows
from .features import Features, spans_of
from .texts import Classes, Task

ACTIVATIONS_AT_ONCE = 2**27  # of one SAE in one batch: half a gigabyte
DEFAULT_BATCH = 32


@dataclass(frozen=True, eq=False)
class PooledBatch:
    """What one batch gives one SAE, or the model. W texts."""

    pooled: csr_matrix  # float32 [W, F]
    leaky: csr_matrix | None = None


@dataclass(frozen=True, eq=False)
class Pool:
    """Pooled features of texts: the model's by layers, the latents' by SAE."""

    rows: Mapping[str, int]  # by text
    model: Mapping[tuple[int, ...], csr_matrix]
    latents: Mapping[Subject, csr_matrix]
    leaky: Mapping[Subject, csr_matrix]
    dtype: torch.dtype  # of the model

    def of_model(self, layers: tuple[int, ...], classes: Classes) -> Features:
        """What the residuals of some layers are on average."""
        return self._features(self.model[layers], classes, self.dtype)

    def of_latents(self, subject: Subject, classes: Classes) -> Features:
        return self._features(self.latents[subject], classes, torch.float32)

    def of_leaky_latents(self, subject: Subject, classes: Classes) -> Features:
        return self._features(self.leaky[subject], classes, torch.float32)

    def _features(self, matrix: csr_matrix, classes: Classes, dtype: torch.dtype) -> Features:
        rows = [self.rows[text] for texts in classes.values() for text in texts]
        return Features(
            csc_matrix(matrix[rows]), spans_of({name: len(texts) for name, texts in classes.items()}), dtype
        )


def pool_task(
    scene: Scene, subjects: Sequence[Subject], task: Task, context: int, batch_size: int | None, leaky: bool = False
) -> Pool:
    """Pool every text of a task, each once however often it is used."""
    texts = list(dict.fromkeys(text for part in (task.train, task.test) for each in part.values() for text in each))
    size = batch_size_for(subjects, context, batch_size)
    layers = sorted({layer for subject in subjects for layer in subject.layers})
    batches = text_batches(scene.model, texts, layers, context, size, attention=attention_for(scene, subjects))
    with scene.watch.stage(f"{task.name}: texts", len(texts), "texts") as advance:
        return pool(texts, subjects, masked_batches(scene.model, batches, advance), scene.model.dtype, leaky)


def pool(
    texts: Sequence[str], subjects: Sequence[Subject], batches: Iterable[Windows], dtype: torch.dtype, leaky: bool
) -> Pool:
    """Pool masked batches of these texts."""
    groups = list(dict.fromkeys(subject.layers for subject in subjects))
    model: dict[tuple[int, ...], list[csr_matrix]] = {layers: [] for layers in groups}
    latents: dict[Subject, list[PooledBatch]] = {subject: [] for subject in subjects}
    for batch in batches:
        valid = {layers: valid_positions(batch, layers) for layers in groups}
        for layers in groups:
            model[layers].append(to_sparse(mean_resid(batch, layers, valid[layers])))
        for subject in subjects:
            latents[subject].append(mean_latents(subject, batch, valid[subject.layers], leaky))
    return Pool(
        rows={text: row for row, text in enumerate(texts)},
        model={layers: stacked(parts) for layers, parts in model.items()},
        latents={subject: stacked([part.pooled for part in parts]) for subject, parts in latents.items()},
        leaky={subject: stacked([p.leaky for p in parts if p.leaky is not None]) for subject, parts in latents.items()}
        if leaky
        else {},
        dtype=dtype,
    )


def masked_batches(
    model: LanguageModel, batches: Iterable[Windows], advance: Callable[[int], None]
) -> Iterator[Windows]:
    """Batches with the residuals of BOS, EOS and padding set to zero."""
    special = torch.tensor(sorted({model.bos, model.pad, *(() if model.eos is None else (model.eos,))}))
    for batch in batches:
        yield masked(batch, ~torch.isin(batch.tokens, special.to(batch.tokens.device)))
        advance(len(batch))


def masked(batch: Windows, keep: Tensor) -> Windows:
    """The batch with residuals of zero where `keep` is false."""
    resid = {layer: x * keep[..., None].to(x.dtype) for layer, x in batch.resid.items()}
    return replace(batch, keep=keep & batch.valid, resid=resid)


def valid_positions(batch: Windows, layers: Sequence[int]) -> Tensor:
    """bool [W, T]: where the residual does not sum to zero."""
    return beside(batch, layers).sum(dim=-1) != 0


def mean_resid(batch: Windows, layers: Sequence[int], valid_WT: Tensor) -> Tensor:
    """[W, D] in the model's dtype."""
    x_WTD = beside(batch, layers)
    return x_WTD.sum(dim=1) / valid_WT.to(x_WTD.dtype).sum(dim=1, keepdim=True)


def mean_latents(subject: Subject, batch: Windows, valid_WT: Tensor, leaky: bool) -> PooledBatch:
    """Mean latents of the texts of a batch."""
    acts_WTF = subject.encode(batch)
    count_W1 = valid_WT.to(acts_WTF.dtype).sum(dim=1, keepdim=True)
    pooled = torch.einsum("wtf,wt->wf", acts_WTF, valid_WT.to(acts_WTF.dtype)) / count_W1
    return PooledBatch(to_sparse(pooled), to_sparse(acts_WTF.sum(dim=1) / count_W1) if leaky else None)


def beside(batch: Windows, layers: Sequence[int]) -> Tensor:
    """The residuals of some layers side by side, in the model's dtype."""
    return torch.cat([batch.resid[layer] for layer in layers], dim=-1)


def to_sparse(dense: Tensor) -> csr_matrix:
    return csr_matrix(dense.float().cpu().numpy())


def stacked(parts: Sequence[csr_matrix]) -> csr_matrix:
    return csr_matrix(vstack(parts, dtype=np.float32))


def batch_size_for(subjects: Sequence[Subject], context: int, wanted: int | None) -> int:
    """As many texts at once as asked for, but no more than the widest SAE's activations allow."""
    widest = max(subject.width for subject in subjects)
    return max(1, min(wanted or DEFAULT_BATCH, ACTIVATIONS_AT_ONCE // (context * widest)))


def attention_for(scene: Scene, subjects: Sequence[Subject]) -> AttentionSpec | None:
    """How attention is kept for SAEs that read it: as in the store, in the layers they ask for."""
    layers = tuple(sorted({layer for subject in subjects for layer in subject.attention_layers}))
    if not layers:
        return None
    stored = scene.manifest.attention
    assert stored is not None, "an SAE that reads attention was trained on a store that has it"
    return replace(stored, layers=layers)
