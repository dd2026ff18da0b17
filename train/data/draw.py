"""What one step draws from its block: rows of activations in the form each SAE wants them.

A draw is shared by a whole fleet: each layer is gathered, converted and scaled once for all SAEs that
want tokens, and once for all that want windows. So is whatever else goes to the device.
B rows, W windows, T context, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache_schema import AttentionCsr
from .batch import AttentionRows, Batch, Needs, Rows
from .block import Block


class Draw:
    """The batches of one step. `rows_of(windows)` gives tokens one by one, or whole windows."""

    def __init__(
        self,
        block: Block,
        tokens: Rows | None,
        windows: Rows | None,
        scales: Mapping[int, Tensor],
        device: torch.device,
    ) -> None:
        self.block = block
        self._rows = {False: tokens, True: windows}
        self._scales = scales
        self.device = device
        self._scaled: dict[tuple[bool, tuple[int, ...]], Tensor] = {}
        self._made: dict[tuple[str, int], Any] = {}

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Whether tokens, whole windows or both are drawn."""
        return tuple(kind for kind, rows in self._rows.items() if rows is not None)

    def rows_of(self, windows: bool) -> Rows:
        rows = self._rows[windows]
        assert rows is not None, "this stream was not told that anyone needs rows of this kind"
        return rows

    def batch(self, needs: Needs) -> Batch:
        """The batch for an SAE with these needs."""
        target = None if needs.targets is None else self._activations(needs.windows, needs.targets)
        return Batch(self._activations(needs.windows, needs.inputs), target, self._side(needs))

    def store_windows(self, windows: bool) -> np.ndarray:
        """int64 [B], the store's number of the window that each row comes from."""
        return self.block.windows[self.rows_of(windows).places // self.block.context]

    def non_finite_rows(self, windows: bool) -> np.ndarray:
        """bool [B], rows with a value that is no finite number in any layer that was drawn."""
        tables = [x for (kind, _), x in self._scaled.items() if kind == windows]
        return torch.stack([~x.isfinite().all(dim=1) for x in tables]).any(dim=0).cpu().numpy()

    def labels(self, windows: bool) -> np.ndarray:
        """Document of each drawn token, or of the beginning of each drawn window."""
        rows = self.rows_of(windows)
        if rows.windows is not None:
            return self.block.documents[rows.windows, 0]
        return self.block.documents.ravel()[rows.places]

    def _activations(self, windows: bool, layers: tuple[int, ...]) -> Tensor:
        """float32 [B, len(layers) * D], scaled."""
        if (windows, layers) not in self._scaled:
            if len(layers) == 1:
                raw = self.block.resid[layers[0]].index_select(0, self._places_on_device(windows))
                self._scaled[windows, layers] = raw.to(torch.float32) * self._scales[layers[0]]
            else:
                parts = [self._activations(windows, (layer,)) for layer in layers]
                self._scaled[windows, layers] = torch.cat(parts, dim=1)
        return self._scaled[windows, layers]

    def _places_on_device(self, windows: bool) -> Tensor:
        return self._once("places", windows, lambda: self._to_device(self.rows_of(windows).places))

    def _side(self, needs: Needs) -> dict[str, Any]:
        """Named side inputs, those that were asked for."""
        kind, rows, block = needs.windows, self.rows_of(needs.windows), self.block
        side: dict[str, Any] = {}
        if needs.tokens:
            side["token"] = self._once("token", kind, lambda: self._of_rows(block.tokens, rows))
        if needs.documents:
            side["document"] = self._once("document", kind, lambda: self._of_rows(block.documents, rows))
        if needs.positions or kind:
            side["position"] = self._once("position", kind, lambda: self._to_device(rows.places % block.context))
        if rows.windows is not None:
            windows = rows.windows
            side |= self._once("window", kind, lambda: self._window_side(rows.places, windows))
        if needs.attention_layers:
            assert rows.windows is not None, "attention is of whole windows"
            side["attention"] = {layer: self._attention(layer, rows.windows) for layer in needs.attention_layers}
        return side

    def _once(self, name: str, of: int, make: Callable[[], Any]) -> Any:
        """What `make` makes, made for the first SAE that wants it."""
        if (name, of) not in self._made:
            self._made[name, of] = make()
        return self._made[name, of]

    def _of_rows(self, table: np.ndarray, rows: Rows) -> Tensor:
        return self._to_device(table.ravel()[rows.places].astype(np.int64))

    def _window_side(self, places: np.ndarray, windows: np.ndarray) -> dict[str, Tensor]:
        """`window` [B]: the row's window in the batch; `row_of` [W, T]: the row of a place, or -1."""
        context = self.block.context
        window = np.repeat(np.arange(len(windows)), self.block.trains[windows].sum(axis=1))
        row_of = np.full((len(windows), context), -1, np.int64)
        row_of[window, places % context] = np.arange(len(places))
        return {"window": self._to_device(window), "row_of": self._to_device(row_of)}

    def _attention(self, layer: int, windows: np.ndarray) -> AttentionRows:
        return self._once("attention", layer, lambda: self._to_rows(self.block.attention[layer].take(windows)))

    def _to_rows(self, csr: AttentionCsr) -> AttentionRows:
        return AttentionRows(
            indptr=self._to_device(csr.indptr.astype(np.int64)),
            indices=self._to_device(csr.indices.astype(np.int64)),
            data=self._to_device(csr.data.astype(np.float32)),
            kept_mass=self._to_device(csr.kept_mass.astype(np.float32)),
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def token_rows(block: Block, chosen: np.ndarray) -> Rows:
    """The rows of chosen trainable tokens, given by their rank among the block's."""
    return Rows(block.trainable[chosen])


def window_rows(block: Block, windows: np.ndarray) -> Rows:
    """The rows of all trainable tokens of some windows, given by their number in the block."""
    window, position = np.nonzero(block.trains[windows])
    return Rows(windows[window] * block.context + position, windows)
