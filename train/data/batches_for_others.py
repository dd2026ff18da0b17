"""A store's activations for other trainers: an iterable torch data set that can save and restore its position.

Order, read-ahead and batches are those of our own runs (`shuffle_order.py`, `batch_stream.py`): step s of seed 0 holds
the tokens that step s of `sae-train` with `data.seed=0` trains on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...cache_schema import Store
from ...cache_schema.sites import RESID, Place
from ..errors import ConfigInvalid, StateInvalid
from .batch import Needs
from .batch_stream import Feed, joint_request
from .scaling import Stats, bounds_of
from .shuffle_order import Plan


class Batches(IterableDataset[Tensor]):
    """Batches of a hook of one layer [batch, D], or of several [batch, layers, D], in float32.

    Special tokens are left out, and rows of massive norm if the statistics leave them out.
    Each `for` loop continues in the store for another `epochs` epochs (None: endless), each in a new order. Data is
    read ahead, so wrap it in a `DataLoader` only with `batch_size=None` and no workers.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        layers: int | tuple[int, ...],
        stats: Mapping[Place, Stats],
        device: torch.device,
        *,
        hook: str = RESID,
        split: str = "train",
        epochs: int | None = 1,
        scaled: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._store, self._plan, self._device, self._split = store, plan, device, split
        self._is_single = isinstance(layers, int)
        self._needs = Needs((layers,) if isinstance(layers, int) else tuple(layers), hook=hook)
        unscaled = {layer: replace(s, scale=torch.ones_like(s.scale)) for layer, s in stats.items()}
        self._stats = stats if scaled else unscaled
        self._epochs, self._rank, self._size, self._scaled = epochs, rank, size, scaled
        if epochs is not None and epochs < 1:
            raise ConfigInvalid(f"epochs: expected 1 or more, or None for endless batches, found {epochs}")
        if not self._needs.layers:
            raise ConfigInvalid("layers: expected at least one layer, found none")
        if not 0 <= rank < size:
            raise ConfigInvalid(f"rank: expected one of 0 to {size - 1} of size {size}, found {rank}")
        store.spans(joint_request([self._needs], split))  # report missing data now
        plan.locate(0)
        self._step, self._feed = 0, None
        self._passes = 1

    def __iter__(self) -> Iterator[Tensor]:
        """Continue from the current position; after the end of a pass, start the next one."""
        if get_worker_info() is not None:
            raise ConfigInvalid(
                "expected no worker processes, because threads read batches ahead, found one: set num_workers=0"
            )
        if self._step == self._end:
            self._passes += 1
        return self

    def __next__(self) -> Tensor:
        if self._step == self._end:
            self.close()
            raise StopIteration
        if self._feed is None:
            parts = (self._store, self._plan, [self._needs], self._stats, self._device)
            self._feed = Feed(*parts, self._rank, self._size, self._end, self._split)
            # At the latest when this object is deleted, or before the interpreter shuts down.
            self._close_feed = weakref.finalize(self, self._feed.close)
        x = self._feed.draw(self._step).batch(self._needs).x
        self._step += 1
        return x if self._is_single else x.view(len(x), len(self._needs.inputs), -1)

    def __len__(self) -> int:
        """Batches in one pass."""
        if self._epochs is None:
            raise TypeError("endless batches (epochs=None) have no length")
        return self._plan.steps_in(self._passes * self._epochs) - self._plan.steps_in((self._passes - 1) * self._epochs)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what determines the next batches, as plain numbers and strings."""
        return {"step": self._step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; a state saved from other batches is refused."""
        expected = self._identity
        wrong = [key for key in expected if state.get(key) != expected[key]]
        if wrong or not isinstance(step := state.get("step"), int) or step < 0:
            found = ", ".join(f"{key} {state.get(key)!r} (here {expected.get(key)!r})" for key in wrong or ["step"])
            raise StateInvalid(
                f"expected a state saved from these same batches, found {found}: open them with their earlier settings"
            )
        self.close()
        self._step, self._passes = step, 1
        while self._end is not None and self._end < step:
            self._passes += 1

    def close(self) -> None:
        """Stop reading ahead and release the memory; the next batch starts it again."""
        if self._feed is not None:
            self._close_feed()
            self._feed = None

    @property
    def _end(self) -> int | None:
        """The step at which this pass ends."""
        return None if self._epochs is None else self._plan.steps_in(self._passes * self._epochs)

    @property
    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "hook": self._needs.hook,
            "cache_id": self._store.manifest.cache_id,
            "shard_windows": self._store.manifest.shard_windows,  # not part of the id, but determines the order
            "split": self._split,
            "layers": list(self._needs.inputs),
            "batch_tokens": plan.batch_tokens,
            "pool_tokens": plan.pool_tokens,
            "seed": plan.seed,
            "scaled": self._scaled,
            "rank": self._rank,
            "size": self._size,
            "largest_norms": {str(layer): bound for layer, bound in bounds_of(self._stats).items()},
        }
