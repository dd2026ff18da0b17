"""What one step draws from its block: rows of activations in the form that each SAE needs.

A draw is shared by a whole fleet: each layer is gathered, converted and scaled once for all SAEs that need the same
kind of rows (tokens or whole windows), and so is everything else. All of it is made on the device, from the block and
the order that was sent with it: a step sends nothing.
B rows, W windows, T context, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache_schema.sites import Place
from .batch import AttentionRows, Batch, Kind, Needs, Rows
from .block import Attention, Block, as_int64, even_size
from .device_copies import send


class Draw:
    """The batches of one step, from its rows of each kind."""

    def __init__(
        self,
        block: Block,
        rows: Mapping[Kind, Rows],
        scales: Mapping[Place, Tensor],
        device: torch.device,
    ) -> None:
        self.block = block
        self.rows = rows
        self._scales = scales
        self.device = device
        self._bounded = {layer for kind in rows for layer in kind.layers}
        self._scaled: dict[tuple[Kind, tuple[Place, ...]], Tensor] = {}
        self._computed: dict[tuple[str, Any], Any] = {}

    def batch(self, needs: Needs) -> Batch:
        kind = needs.kind(self._bounded)
        target = None if needs.targets is None else self._activations(kind, needs.target_places)
        return Batch(self._activations(kind, needs.input_places), target, self._side(needs, kind))

    def ordinary(self, needs: Needs) -> Tensor:
        """bool [B], the rows of `batch(needs)` that are not massive in any layer that it reads."""
        ordinary = self.block.trains_on([layer for layer in needs.layers if layer in self.block.massive])
        places = self.rows[needs.kind(self._bounded)].places
        return torch.from_numpy(ordinary.ravel()[places]).to(self.device)

    def store_windows(self, kind: Kind) -> np.ndarray:
        """int64 [B], the index in the store of each row's window."""
        return self.block.windows[self.rows[kind].places // self.block.context]

    def non_finite_rows(self, kind: Kind) -> np.ndarray:
        """bool [B], rows with a value that is not a finite number in any drawn layer."""
        tables = [x for (drawn, _), x in self._scaled.items() if drawn == kind]
        return torch.stack([~x.isfinite().all(dim=1) for x in tables]).any(dim=0).cpu().numpy()

    def labels(self, windows: bool) -> np.ndarray:
        """Document of each drawn token, or at the start of each drawn window."""
        rows = next(rows for kind, rows in self.rows.items() if kind.windows == windows)
        if rows.windows is not None:
            return self.block.documents[rows.windows, 0]
        return self.block.documents.ravel()[rows.places]

    def _activations(self, kind: Kind, layers: tuple[Place, ...]) -> Tensor:
        """float32 [B, len(layers) * D], scaled."""
        if (kind, layers) not in self._scaled:
            if len(layers) == 1:
                raw = self.block.resid[layers[0]].take(self.rows[kind].places_on_device)
                self._scaled[kind, layers] = raw.values().mul_(self._scales[layers[0]])
            else:
                parts = [self._activations(kind, (layer,)) for layer in layers]
                self._scaled[kind, layers] = torch.cat(parts, dim=1)
        return self._scaled[kind, layers]

    def _side(self, needs: Needs, kind: Kind) -> dict[str, Any]:
        rows, block = self.rows[kind], self.block
        side: dict[str, Any] = {}
        if needs.tokens:
            side["token"] = self._once("token", kind, lambda: _read_rows(block.tokens_on_device, rows))
        if needs.documents:
            side["document"] = self._once("document", kind, lambda: _read_rows(block.documents_on_device, rows))
        if needs.positions or needs.windows:
            side["position"] = self._once("position", kind, lambda: rows.places_on_device % block.context)
        if rows.windows is not None:
            with_massive = [layer for layer in needs.layers if layer in block.massive and layer not in kind.layers]
            side |= self._once(
                "window",
                (kind, *with_massive),
                lambda: self._window_side(rows, self.ordinary(needs) if with_massive else None),
            )
        if needs.attention_layers:
            assert rows.windows is not None, "attention is of whole windows"
            side["attention"] = self._attention(needs.attention_layers, rows)
        return side

    def _once(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which runs for the first SAE that needs it."""
        if (name, key) not in self._computed:
            self._computed[name, key] = compute()
        return self._computed[name, key]

    def _window_side(self, rows: Rows, ordinary: Tensor | None) -> dict[str, Tensor]:
        """`window` [B]: the row's window in the batch; `row_of` [W, T]: the row at a position, or -1. Rows not in
        `ordinary` [B] are left out of `row_of`: massive ones, which do not occur in training."""
        assert rows.sizes_on_device is not None
        context, count, sizes = self.block.context, len(rows.places), rows.sizes_on_device
        window = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=count)
        row_of = sizes.new_full((len(sizes), context), -1)
        numbers = torch.arange(count, device=sizes.device)
        row_of[window, rows.places_on_device % context] = (
            numbers if ordinary is None else numbers.masked_fill(~ordinary, -1)
        )
        return {"window": window, "row_of": row_of}

    def _attention(self, layers: Sequence[int], rows: Rows) -> dict[int, AttentionRows]:
        assert rows.windows is not None and rows.windows_on_device is not None
        windows, on_device = rows.windows, rows.windows_on_device
        by_layer = {layer: self.block.attention[layer] for layer in layers}
        # A recorded step serves one size. That depends on this SAE's layers alone: more zeros change a sum's bits.
        room = even_size(by_layer.values(), windows) if self.device.type == "cuda" else None

        def take(attention: Attention) -> AttentionRows:
            found = attention.take(windows, on_device)
            return found if room is None else found.padded(room)

        # Not by kind: windows are the same whichever of their rows are left out.
        return {
            layer: self._once("attention", (layer, room), partial(take, attention))
            for layer, attention in by_layer.items()
        }


class TokenOrder:
    """The order in which a block's tokens are drawn, as indices of trainable tokens; sent once.

    Massive rows are dropped from it, and the rest is spread evenly over the same steps.
    """

    def __init__(self, block: Block, chosen: np.ndarray, device: torch.device, layers: Sequence[Place] = ()) -> None:
        places = block.trainable[chosen]
        self._length = len(places)
        self._places = places[block.trains_on(layers).ravel()[places]] if layers else places
        self._on_device = send(torch.from_numpy(self._places), device)

    def rows(self, part: slice) -> Rows:
        start, stop = (edge * len(self._places) // self._length for edge in (part.start, part.stop))
        return Rows(self._places[start:stop], self._on_device[start:stop])


class WindowOrder:
    """The order in which a block's windows are drawn, by their index in the block; sent once."""

    def __init__(self, block: Block, windows: np.ndarray, device: torch.device, layers: Sequence[Place] = ()) -> None:
        window, position = np.nonzero(block.trains_on(layers)[windows])
        sizes = np.bincount(window, minlength=len(windows))
        self._windows, self._places = windows, windows[window] * block.context + position
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        arrays = (self._places, windows, sizes)
        self._on_device = tuple(send(torch.from_numpy(array), device) for array in arrays)

    def rows(self, part: slice) -> Rows:
        """The rows of all trainable tokens in a part of the order."""
        own = slice(self._starts[part.start], self._starts[part.stop])
        places, windows, sizes = self._on_device
        return Rows(self._places[own], places[own], self._windows[part], windows[part], sizes[part])


def _read_rows(table: Tensor, rows: Rows) -> Tensor:
    return as_int64(table.reshape(-1).index_select(0, rows.places_on_device))
