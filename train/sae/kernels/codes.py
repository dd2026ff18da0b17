"""Codes: an SAE's activations for a batch, sparse where that is faster and dense where not.

B rows, F latents, N entries. The same elementwise code serves both forms: `values` is [N] at a
support or [B, F] without one, and `per_latent` / `per_row` bring vectors into that shape. Entries outside
a support are exactly zero and have no gradient, so a gate must include in its support every entry whose
value or derivative can differ from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from .dense_products import Product
from .sparse_products import latent_count, latent_sum
from .sparse_products_with_gradients import decode_at, decode_dense, spread_latents, spread_rows, sum_rows
from .sparse_support import Support


@dataclass(frozen=True, eq=False)
class Codes:
    """Values of latents for a batch of rows."""

    values: Tensor  # [N] at the support, [B, F] without
    support: Support | None
    num_rows: int
    num_latents: int
    pre: Tensor | None = None  # the values before the gate, in the same places
    product: Product = "float32"
    """The precision in which dense codes are decoded, and rows gathered for the gradients of sparse ones."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """Codes at the same places with changed values; `change` is elementwise."""
        return self.with_values(change(self.values))

    def with_values(self, values: Tensor) -> Codes:
        return replace(self, values=values)

    def per_latent(self, vector_F: Tensor) -> Tensor:
        """A per-latent vector in the shape of `values`."""
        return vector_F if self.support is None else spread_latents(vector_F, self.support)

    def per_row(self, vector_B: Tensor) -> Tensor:
        """A per-row vector in the shape of `values`."""
        return vector_B[:, None] if self.support is None else spread_rows(vector_B, self.support)

    def decode(self, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
        """values @ W_dec + b_dec: [B, D]."""
        if self.support is not None:
            return decode_at(self.values, W_dec, b_dec, self.support, self.product)
        return decode_dense(self.values, W_dec, b_dec, self.product)

    def dense(self) -> Tensor:
        """[B, F], differentiable."""
        if self.support is None:
            return self.values
        flat = self.values.new_zeros(self.num_rows * self.num_latents)
        return flat.index_put((self.support.flat,), self.values).view(self.num_rows, self.num_latents)

    def sum_over_latents(self, values: Tensor) -> Tensor:
        """[B], the sum over each row of values at the places of these codes; differentiable."""
        return values.sum(1) if self.support is None else sum_rows(values, self.support)

    def mean_over_rows(self) -> Tensor:
        """Sum of the values divided by the number of rows."""
        return self.values.sum() / self.num_rows

    @cached_property
    def fired(self) -> Tensor:
        """int64 [F], the number of rows in which each latent is not zero; no gradient."""
        active = self.values.detach() != 0
        return active.sum(0) if self.support is None else latent_count(self.support, active)

    @cached_property
    def l0(self) -> Tensor:
        """Mean number of non-zero latents per row; no gradient."""
        return self.fired.sum() / self.num_rows

    def latent_totals(self) -> Tensor:
        """[F], each latent's values summed over rows; no gradient."""
        values = self.values.detach()
        return values.sum(0) if self.support is None else latent_sum(self.support, values)


def codes_from_dense(acts: Tensor, support: Support | None) -> Codes:
    """Codes read from a differentiable dense table [B, F] at the support."""
    values = acts if support is None else acts.reshape(-1)[support.flat]
    return Codes(values, support, acts.shape[0], acts.shape[1])
