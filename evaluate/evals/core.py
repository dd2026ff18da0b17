"""core: how well an SAE reconstructs, how sparse it is, and what the model loses when it is spliced in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...cache_schema.strict import to_json
from ..feed import count_windows, store_batches
from ..needs import Needs
from ..results import Failure, Result
from ..scene import Scene
from ..subject import Subject

NEEDS = Needs(store=True)
SUMMARY = ("sparsity.l0",)


@dataclass(frozen=True)
class Config:
    batch_windows: int = 16


def evaluate(scene: Scene, subjects: Sequence[Subject], config: Config) -> Iterator[Result | Failure]:
    layers = sorted({layer for subject in subjects for layer in subject.layers})
    active, tokens = dict.fromkeys(subjects, 0), 0
    with scene.watch.stage("core", count_windows(scene.store, "test")) as advance:
        for batch in store_batches(scene.store, "test", layers, batch_windows=config.batch_windows):
            tokens += int(batch.keep.sum())
            for subject in subjects:
                acts = subject.encode(batch)
                active[subject] += int((acts[batch.keep] != 0).sum())
            advance(len(batch))
    for subject in subjects:
        yield Result(subject, to_json(config), {"sparsity": {"l0": active[subject] / tokens}})
