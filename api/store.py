"""The store as notebooks want it: it shows itself, and gives batches to anyone's trainer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Literal

from ..cache_schema import Store as StoredArrays
from ..cache_schema.info import describe_lines, facts
from ..cache_schema.massive_activations import default_multiple
from ..cache_schema.requests_and_spans import Request, validate_request
from ..cache_schema.sites import RESID, place_of, site_of
from ..train.config.run_config import DataConfig
from ..train.data.batches_for_others import Batches
from ..train.data.shuffle_order import Plan, measure_split
from ..train.parallel.processes import choose_device
from ..train.run.fill_config_from_store import with_pool
from ..train.run.preflight import layer_stats
from . import notebook_html


class Store(StoredArrays):
    """A store opened for reading, by its path or URL. `close` it, or use it in a `with`."""

    def batches(
        self,
        layers: int | Sequence[int],
        *,
        hook: str = RESID,
        batch_tokens: int = 4096,
        device: str = "auto",
        shuffle: bool = True,
        seed: int = 0,
        split: str = "train",
        epochs: int | None = 1,
        scaled: bool = False,
        pool_tokens: int | None = None,
        massive_norms: float | Literal["store's"] | None = "store's",
        exact: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> Batches:
        """Batches of activations, float32 on the device: [batch, D] of one layer, [batch, layers, D] of several.

        The same tokens in the same order as `sae-train` draws with this seed; without `shuffle`, in the order of the
        store. Special tokens are left out, and rows whose norm is beyond `massive_norms` times the median (None: no
        such row; if nothing is said, as in a run): where there are some, a batch is a little shorter. What does not
        fill a batch is left out too. `scaled` gives rows the mean norm sqrt(D) that SAEs train on here. Of `size`
        processes each takes its share of every batch. `state_dict` and `load_state_dict` resume to the same batches.
        `hook` names what is read of these layers; `exact` refuses a store that does not keep it to the bit.
        """
        every = tuple(map(operator.index, layers if isinstance(layers, Iterable) else (layers,)))  # NumPy's numbers too
        places = [place_of(hook, layer) for layer in every]
        validate_request(self.manifest, Request.of(map(site_of, places), exact=exact))
        multiple = default_multiple(self.manifest) if massive_norms == "store's" else massive_norms
        asked = with_pool(DataConfig(seed, batch_tokens, pool_tokens, multiple), self.manifest)
        assert asked.pool_tokens is not None
        plan = Plan(
            measure_split(self, split),
            batch_tokens=batch_tokens,
            pool_tokens=asked.pool_tokens,
            seed=seed if shuffle else None,
        )
        wanted = every if isinstance(layers, Iterable) else every[0]
        place = choose_device(device)
        stats = {one: layer_stats(self, one, multiple) for one in places}
        course = {"hook": hook, "split": split, "epochs": epochs, "scaled": scaled, "rank": rank, "size": size}
        return Batches(self, plan, wanted, stats, place, **course)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.manifest.layers))
        return f"Store({self.url!r}): {self.manifest.model.id}, layers {layers}, {self.manifest.tokens:,} tokens"

    def _repr_html_(self) -> str:
        return notebook_html.facts(describe_lines(facts(self)), self.url)
