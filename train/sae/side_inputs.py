"""Side inputs: what an SAE may read besides the activations, by name.

Tokens, positions, windows or attention of the batch, and the knobs: scheduled values that are not loss weights (p,
temperature). Reading an input that was not requested is an error, so a variant cannot depend on one that it would lack
at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SideInputMissing
from ..parallel.dictionary_over_processes import ALL_LATENTS, Latents
from ..parallel.sums_over_processes import ALONE, BatchRanks
from .kernels.window_gram import Places


class Side:
    """Named side inputs and knobs of one batch."""

    def __init__(
        self,
        inputs: Mapping[str, Any] | None = None,
        knobs: Mapping[str, float] | None = None,
        ranks: BatchRanks = ALONE,
        latents: Latents = ALL_LATENTS,
    ) -> None:
        self._inputs = dict(inputs or {})
        self.knobs = dict(knobs or {})
        self.ranks = ranks
        self.latents = latents

    def __getitem__(self, name: str) -> Any:
        if name not in self._inputs:
            raise SideInputMissing(
                f"expected a side input {name!r}, found {sorted(self._inputs)}; "
                "name it in the variant's needs(), or pass it to encode()"
            )
        return self._inputs[name]

    @property
    def places(self) -> Places:
        """The positions of the batch's rows in their windows."""
        return Places(self["window"], self["position"], self["row_of"])

    def with_knobs(self, knobs: Mapping[str, float]) -> Side:
        """The same inputs with these knobs."""
        return Side(self._inputs, knobs, self.ranks, self.latents)

    def knob(self, name: str, default: float) -> float:
        """The knob's value at this step; `default` if it has no schedule."""
        return self.knobs.get(name, default)


NO_SIDE = Side()
