"""The synthetic inputs of the official packages as our own objects, and the packages' outputs."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix, vstack
from torch import Tensor

from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.evals.probing.draw_classes import Task
from saemill.evaluate.evals.probing.pooled_features import Features, Pool, make_pool, read_piece, spans_of
from saemill.evaluate.model.batches import Windows
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder

from ....golden import make_saebench_probes as maker

GOLDEN = Path(__file__).parents[3] / "golden"
LAYER = 3


@pytest.fixture
def global_random_state_stays():
    torch.manual_seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()


@dataclass(frozen=True)
class Made:
    """Activations of some texts, as a task and as batches like those of a model."""

    task: Task
    acts: dict[str, Tensor]  # by text, [T, D]

    def batches(self, size: int = 25) -> list[Windows]:
        rows = torch.stack(list(self.acts.values()))
        return [windows_of(part) for part in rows.split(size)]

    def pool(self, subject: LoadedSae, leaky: bool = False) -> Pool:
        return make_pool(
            list(self.acts), [read_piece(part, [subject], leaky) for part in self.batches()], torch.float32
        )


def features_of(classes: Mapping[str, Tensor]) -> Features:
    """Features from a dense matrix for each class."""
    parts = [csc_matrix(part.float().numpy()) for part in classes.values()]
    return Features(csc_matrix(vstack(parts)), spans_of(classes), next(iter(classes.values())).dtype)


def windows_of(x: Tensor) -> Windows:
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    return Windows(tokens=tokens, keep=valid, valid=valid, resid={LAYER: x})


def make_task(name: str, parts: dict[str, dict[str, np.ndarray]]) -> Made:
    acts: dict[str, Tensor] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    for part, classes in parts.items():
        groups[part] = {}
        for label, rows in classes.items():
            texts = [f"{part} {label} {i}" for i in range(len(rows))]
            groups[part][label] = texts
            acts |= dict(zip(texts, torch.from_numpy(rows), strict=True))
    return Made(Task(name, groups["train"], groups["test"]), acts)


def make_subject(sae: SparseAutoencoder, label: str = "sae") -> LoadedSae:
    here, sizes = Path(), (sae.d_in, sae.num_latents, 0)
    return LoadedSae(label, here, here, None, "standard", lambda: sae, *sizes, {}, (LAYER,), (LAYER,))


@dataclass(frozen=True)
class Official:
    outputs: dict[str, Any]
    subject: LoadedSae
    probing: dict[str, Made]
    scr: Made


@pytest.fixture(scope="session")
def official() -> Official:
    made = maker.inputs()
    weights = {name: torch.from_numpy(array) for name, array in made["sae"].items()}
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    return Official(
        json.loads((GOLDEN / "saebench_probes" / "official.json").read_text()),
        make_subject(SparseAutoencoder(gate=Relu(), **weights)),
        {name: make_task(name, parts) for name, parts in made["probing"].items()},
        make_task("scr", made["scr"]),
    )
