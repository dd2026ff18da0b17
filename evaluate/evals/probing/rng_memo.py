"""Work that depends on random draws alone, done once for all SAEs whose generators stand at the same place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def seeded(seed: int) -> torch.Generator:
    """A generator of one's own: the stream that `torch.manual_seed` would give, and no global state."""
    return torch.Generator().manual_seed(seed)


class Memo(Generic[T]):
    """Remembers what was computed from a generator's state, and the state that it left."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[T, Tensor]] = {}

    def recall(self, generator: torch.Generator, compute: Callable[[], T]) -> T:
        """What `compute` gives, and the generator where `compute` leaves it."""
        key = generator.get_state().numpy().tobytes()
        if key not in self._known:
            self._known[key] = compute(), generator.get_state()
        value, after = self._known[key]
        generator.set_state(after)
        return value
