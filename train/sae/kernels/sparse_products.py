"""The three sparse products behind every step, without autograd.

B rows, D width, F latents, N entries of a support. A bag sum is a sparse times dense product, pair dots are a dense
times dense product sampled at the support. On a CPU, bag sums use the embedding-bag kernels, which read each table row
once and write no intermediate results: two to four times as fast at these shapes as torch's CSR products. Pair dots use
the sampled CSR product, which is the faster one there. A GPU has its own kernels, or the bags without Triton.
"""

from __future__ import annotations

import warnings
from functools import cache
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional

from .dense_products import Product
from .hardware import runs_triton
from .sparse_support import Support

ONE_AT_A_TIME = Lock()


def bag_sum(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[r] = sum of weights[n] * table[indices[n]] over offsets[r] <= n < offsets[r + 1]."""
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    if runs_triton(table):
        from .triton import sparse_products

        return sparse_products.bag_sum(table.contiguous(), indices, offsets, weights.contiguous())
    return functional.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def decode_sum(support: Support, values: Tensor, W_FD: Tensor) -> Tensor:
    """values @ W over the support: [B, D]."""
    return bag_sum(W_FD, support.latents, support.offsets, values)


def weight_sum(support: Support, values: Tensor, rows_BD: Tensor) -> Tensor:
    """values^T @ rows over the support: [F, D], the gradient of a weight table."""
    turned = support.by_latent
    return bag_sum(rows_BD, turned.rows, turned.offsets, values[turned.order])


def pair_dots(support: Support, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
    """<rows[b], W[f]> for every pair of the support: [N]."""
    if support.latents.numel() == 0:
        return rows_BD.new_zeros(0)
    rows_BD, W_FD = rows_BD.contiguous(), W_FD.contiguous()
    if runs_triton(rows_BD):
        from .triton import sparse_products

        turned = support.by_latent  # reads the larger table once, while the rows stay in cache
        return sparse_products.pair_dots(W_FD, turned.latents, rows_BD, turned.rows, turned.order)
    if rows_BD.device.type != "cpu":  # exactly the gradient of an embedding bag for its weights
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows_BD, W_FD, support.latents, support.offsets[:-1], support.rows, 0
        )
    # The larger table is read once, in order, while the smaller one stays in cache.
    if support.num_latents <= support.num_rows:
        return sampled_dots(support.offsets, support.latents, rows_BD, W_FD)
    turned = support.by_latent
    dots = sampled_dots(turned.offsets, turned.rows, W_FD, rows_BD)
    return torch.empty_like(dots).index_copy_(0, turned.order, dots)


def gathered(rows_BD: Tensor, product: Product) -> Tensor:
    """Rows as a GPU's kernels gather them for gradients, k times each: in bfloat16 if the product rounds to it."""
    return rows_BD.to(torch.bfloat16) if product == "bfloat16" and runs_triton(rows_BD) else rows_BD


def column_sum(rows_BD: Tensor) -> Tensor:
    """Sum over rows: [D]; as a product it runs at memory speed."""
    return rows_BD.new_ones(rows_BD.shape[0]) @ rows_BD


def latent_sum(support: Support, values: Tensor) -> Tensor:
    """Sum of the values of each latent: [F]."""
    if values.device.type == "cpu":
        return values.new_zeros(support.num_latents).index_add_(0, support.latents, values)
    turned = support.by_latent  # atomics would add in a different order each time
    return _segment_sum(values[turned.order], turned.offsets)


def row_sum(support: Support, values: Tensor) -> Tensor:
    """Sum of the values of each row: [B]."""
    if values.device.type == "cpu":
        return values.new_zeros(support.num_rows).index_add_(0, support.rows, values)
    return _segment_sum(values, support.offsets)


def latent_count(support: Support, mask: Tensor) -> Tensor:
    """Number of entries of each latent in the mask [N]: int64 [F]."""
    latents = support.latents.long()
    return torch.zeros(support.num_latents, dtype=torch.int64, device=mask.device).scatter_add_(0, latents, mask.long())


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    if runs_triton(values):
        from .triton import sparse_products

        return sparse_products.segment_sum(values.contiguous(), offsets)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0)


def sampled_dots(offsets: Tensor, indices: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """<rows[r], table[indices[n]]> for offsets[r] <= n < offsets[r + 1]."""
    _allow_csr()
    nothing = rows.new_zeros(indices.numel())
    pattern = torch.sparse_csr_tensor(offsets, indices, nothing, (len(rows), len(table)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows, table.t(), beta=0.0).values()


@cache
def _allow_csr() -> None:
    """Suppress torch's warning, once per process, that CSR tensors are in beta."""
    with ONE_AT_A_TIME, warnings.catch_warnings():  # the filters belong to all threads
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], torch.zeros(0), (1, 1), check_invariants=False)
