"""AuxK: dead latents are trained to reconstruct what the live ones leave over.

B rows, D width, M dead latents.
1. Pre-activations of the dead latents only, [B, M].
2. The k_aux largest of each row; sparse where k_aux is a small part of M.
3. e_hat = their activations times their decoder rows, without the bias, which the residual e already lacks.
4. Loss = ||e - e_hat||^2 / ||e - mean(e)||^2, with e constant.
Its gradient reaches only encoder and decoder rows of dead latents, and modules that change pre-activations (a norm,
adapters on features).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sae.gates import DENSE_SHARE
from ..sae.kernels.codes import Codes, codes_from_dense
from ..sae.kernels.dense_products import Product, linear, product_on
from ..sae.kernels.hardware import reads_at_once
from ..sae.kernels.select_top_k import support_topk
from ..sae.kernels.sparse_products_with_gradients import affine, squared_error
from ..sae.step_view import DeadLatents, View, split
from ..sae.top_k_over_processes import lowest_of_topk, split_topk

LEAST_SPREAD = 1e-3  # share of the squared error: identical rows have no spread to divide by


@split("alike")
@dataclass(frozen=True)
class AuxK:
    """The auxiliary loss as a term's function."""

    k: int
    rectified: bool = True
    signed: bool = False
    """Choose latents by distance from zero; for codes that are not rectified."""

    def __call__(self, view: View) -> Tensor:
        error, latents = view.residual, view.side.latents
        dead = view.dead_latents
        own = dead.latents.numel()
        count = latents.count(own)
        if count == 0:
            return error.new_zeros(())
        codes = self._codes(view, dead, count)
        error_hat = latents.join(codes.decode(view.sae.W_dec[dead.latents]) if own else torch.zeros_like(error))
        return squared_error(error_hat, error - error_hat.detach()) / _spread(error, view)

    def _codes(self, view: View, dead: DeadLatents, count: int) -> Codes:
        """Codes of the dead latents in this process, of `count` in total. Others in the list are zeros that are chosen
        last, and so add nothing."""
        sae = view.sae
        pre = sae.pre_of_latents(view.x, view.side, dead.latents, dead.is_dead)
        if pre is not None:
            codes = self._dense(dead.only(pre, dim=1), dead, count, view)
        else:
            with torch.no_grad():
                x = sae.encoder_input(view.x, view.side)
            read = x, dead.only(sae.encoder_rows(dead.latents)), dead.only(sae.b_enc[dead.latents])
            if self.k < DENSE_SHARE * count:
                codes = self._sparse(*read, dead, view)
            else:
                codes = self._dense(_affine(*read, view), dead, count, view)
        return sae.with_factors(codes.map(torch.relu) if self.rectified else codes, view.side, dead.latents)

    def _sparse(self, x: Tensor, W_MD: Tensor, b_M: Tensor, dead: DeadLatents, view: View) -> Codes:
        latents = view.side.latents
        with torch.no_grad():
            score = self._score(_affine(x, W_MD, b_M, view), dead)
            support = support_topk(score, self.k) if latents.is_whole else split_topk(score, self.k, latents)
        return Codes(affine(x, None, W_MD, b_M, support), support, x.shape[0], b_M.numel())

    def _dense(self, pre: Tensor, dead: DeadLatents, count: int, view: View) -> Codes:
        if self.k < count:
            score = self._score(pre.detach(), dead)
            pre = torch.where(score >= lowest_of_topk(score, self.k, view.side.latents), pre, 0.0)
        return replace(codes_from_dense(pre, None), product=_product(view))

    def _score(self, pre: Tensor, dead: DeadLatents) -> Tensor:
        """[B, M]: the largest are chosen."""
        if self.signed:
            return pre.abs()
        # Rectified, a negative number is worth no more than the zero of a latent that is not dead.
        return pre if self.rectified or dead.is_dead is None else pre.masked_fill(~dead.is_dead, -torch.inf)


def _affine(x: Tensor, W: Tensor, b: Tensor, view: View) -> Tensor:
    product = _product(view)
    return linear(x, W, b) if product == "float32" else affine(x, None, W, b, None, product=product)


def _product(view: View) -> Product:
    """On a GPU, the encoder's precision: in float32 the dense products here would take half of a step."""
    return "float32" if reads_at_once(view.x) else product_on(view.x.device, view.sae.encoder_product)


def _spread(error: Tensor, view: View) -> Tensor:
    """E||e - mean(e)||^2 over the global batch; for equal rows, or a single one, a small share of E||e||^2."""
    ranks = view.side.ranks
    mean = ranks.mean(error.mean(0))
    total = ranks.mean(error.square().sum() / error.shape[0])
    return torch.maximum(total - mean @ mean, LEAST_SPREAD * total).clamp_min(torch.finfo(error.dtype).tiny)
