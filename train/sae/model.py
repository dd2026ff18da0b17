"""The sparse autoencoder: an affine encoder, a gate, a linear decoder.

B rows, D_in and D_out widths (equal unless a transcoder), F latents. Both weight tables are [F, D],
row-major: the sparse products read and write whole latent rows.

In training (`codes`) one dense product without gradient, in bfloat16 or TF32 if requested and supported by the
hardware, decides where the gate may open. If it was in bfloat16, pre-activations there are recomputed in float32, with
gradient. A gate with dense codes takes them from that product, and all dense products of the step, also in the backward
pass, have its precision. Inference (`encode`) is dense and float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigInvalid
from .gates import Gate, is_plain
from .kernels.codes import Codes
from .kernels.dense_products import Product, linear, matrix_units, product_on
from .kernels.row_gradients import low_copy
from .kernels.sparse_products_with_gradients import affine
from .kernels.sparse_support import Support
from .side_inputs import NO_SIDE, Side

Choose = Callable[[Tensor, Side], Support | None]


class SparseAutoencoder(nn.Module):
    """x -> gate((x - b_dec) W_enc^T + b_enc) -> codes W_dec + b_dec, plus x W_skip^T if there is a skip.

    A subclass whose inference needs more than these weights sets `is_plain` and `needs_side`.
    """

    is_plain = True
    needs_side: tuple[str, ...] = ()
    """Side inputs that `encode` reads."""
    input_mean: Tensor | None

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        gate: Gate,
        b_dec: Tensor | None = None,
        b_enc: Tensor | None = None,
        centres_input: bool = True,
        encoder_product: Product = "float32",
        W_skip: Tensor | None = None,
        input_mean: Tensor | None = None,
    ) -> None:
        """`input_mean` is subtracted from the encoder's input while training, in place of the decoder bias."""
        super().__init__()
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(W_enc.new_zeros(W_enc.shape[0]) if b_enc is None else b_enc)
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(W_dec.new_zeros(W_dec.shape[1]) if b_dec is None else b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)  # [D_out, D_in]
        self.gate = gate
        self.is_plain = type(self).is_plain and is_plain(gate)
        self.centres_input = centres_input
        self.register_buffer("input_mean", input_mean)
        self.encoder_product: Product = encoder_product
        self.extras = nn.ModuleDict()  # trained along, but needed by no activation; set by the trainer
        self.extras_tensors: dict[str, Tensor] = {}  # the tensors of such modules in a loaded SAE, by name
        self.metadata: dict[str, Any] = {}  # metadata of a loaded SAE

    def parts(self) -> dict[str, Any]:
        """The arguments for a module that wraps this one: its weights and gate, which are all that a plain SAE has."""
        if type(self) is not SparseAutoencoder:
            kind = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            raise ConfigInvalid(
                f"expected a plain SparseAutoencoder to wrap, found {kind}: only its weights and gate would be kept, "
                "and a plain SAE trained instead. Choose another base, or settings that do not change its encoder"
            )
        return {
            "W_enc": self.W_enc.detach(),
            "W_dec": self.W_dec.detach(),
            "gate": self.gate,
            "b_dec": self.b_dec.detach(),
            "b_enc": self.b_enc.detach(),
            "centres_input": self.centres_input,
            "encoder_product": self.encoder_product,
            "W_skip": None if self.W_skip is None else self.W_skip.detach(),
            "input_mean": self.input_mean,
        }

    def extra_repr(self) -> str:
        widths = " -> ".join(f"{width:,}" for width in (self.d_in, self.num_latents, self.d_out))
        k = getattr(self.gate, "k", None)
        return f"{self._place()}: {widths}" + ("" if k is None else f", k {k}")

    def _place(self) -> str:
        """The model and hook that it reads, if its metadata names them."""
        names = (self.metadata.get(key) for key in ("model_name", "hook_name"))
        return ", ".join(str(name) for name in names if name) or "an unnamed place"

    def require_sound(self, where: str) -> None:
        """Refuse loaded tensors that refer to something invalid; weights may be any numbers."""

    @property
    def num_latents(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    def centred(self, x: Tensor) -> Tensor:
        """The encoder's input."""
        if self.input_mean is not None:
            return x - self.input_mean
        return x - self.b_dec if self.centres_input else x.to(self.W_enc.dtype)  # the difference already has this dtype

    def trained_center(self, side: Side) -> Tensor | None:
        """What `centred` subtracts, if it is trained."""
        return side.latents.share(self.b_dec) if self.centres_input and self.input_mean is None else None

    def bias_if_saved(self) -> Tensor:
        """[F]: what saving adds to the encoder's biases, since a saved SAE subtracts the decoder bias or nothing from
        its input, in place of the mean."""
        if self.input_mean is None:
            return torch.zeros_like(self.b_enc)
        saved = self.b_dec if self.centres_input else torch.zeros_like(self.input_mean)
        return self.W_enc @ (saved - self.input_mean)

    def codes(self, x: Tensor, side: Side = NO_SIDE) -> Codes:
        """Activations of a training batch [B, D_in], sparse where that is faster."""
        return self.open(self.pre_codes(x, side), side)

    def pre_codes(self, x: Tensor, side: Side = NO_SIDE, choose: Choose | None = None) -> Codes:
        """Pre-activations where the gate may open, or where `choose` decides."""
        center = self.trained_center(side)
        with torch.no_grad():
            x_centred = self.centred(x)
            pre_all = self._all_pre(x_centred)
            support = (choose or self.choose)(pre_all, side)
            known = self._known(pre_all, support)
        if x.requires_grad:
            x_centred, center = self.centred(x), None
        product = product_on(x.device, self.encoder_product)
        pre_values = self._affine(x_centred, center, support, known, product)
        return Codes(pre_values, support, x.shape[0], self.num_latents, pre=pre_values, product=product)

    def choose(self, pre_all: Tensor, side: Side) -> Support | None:
        """Where the gate may open, from all pre-activations."""
        return self.gate.choose(pre_all, side)

    def open(self, pre: Codes, side: Side) -> Codes:
        """Activations from the pre-activations at their support."""
        return self.gate.open(pre, self.b_enc, side)

    def encoder_input(self, x: Tensor, side: Side) -> Tensor:
        """The input that `encoder_rows` are multiplied with: [B, D_in]."""
        return self.centred(x)

    def encoder_rows(self, latents: Tensor) -> Tensor:
        """The encoder rows of these latents, for a whole input row: [M, D_in]."""
        return self.W_enc[latents]

    def pre_of_latents(self, x: Tensor, side: Side, latents: Tensor, learns: Tensor | None) -> Tensor | None:
        """Pre-activations of these latents [B, M], for a constant x; None if `encoder_rows` determine them.

        Their gradient reaches parameters of these latents (of those that `learns` [M] marks, if it is given) and
        parameters shared by all, but no other latent's encoder.
        """
        return None

    def encoder_times(self, factor_D: Tensor) -> Tensor:
        """The encoder's table for an input that is divided by `factor_D`."""
        return self.W_enc * factor_D

    def clear_unwritten(self, table_FD: Tensor) -> Tensor:
        """Zero the entries of a decoder-shaped table that latents may not write; in place."""
        return table_FD

    def with_factors(self, codes: Codes, side: Side, latents: Tensor) -> Codes:
        """Codes of only some latents, one column for each, times the factors that a wrapper gives them."""
        return codes

    def reconstruct(self, codes: Codes, side: Side = NO_SIDE) -> Tensor:
        """x_hat of codes, without the skip: [B, D_out]."""
        return rebuild(codes, self.W_dec, self.b_dec, side)

    def skip(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """x_hat plus the skip, which bypasses the codes."""
        return x_hat if self.W_skip is None else x_hat + x.to(self.W_skip.dtype) @ self.W_skip.t()

    def lower(self, amount: float) -> None:
        """Subtract this much from every pre-activation; without gradient, like `rescale`."""
        self.b_enc.sub_(amount)
        self.gate.lower(amount)

    def rescale(self, factor: float) -> None:
        """Multiply every activation by this factor, through the encoder."""
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)
        self.gate.rescale(factor)

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        """Activations [..., F] as the saved SAE computes them."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"expected activations [..., {self.d_in}] from {self._place()}, found {list(x.shape)}")
        return self.gate.infer(self._linear(self.centred(x), self.W_enc, self.b_enc), self.b_enc)

    def decode(self, acts: Tensor) -> Tensor:
        """x_hat of dense activations [..., F], without the skip."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x, self.decode(self.encode(x)))

    def _linear(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """The encoder's dense product: [..., F]."""
        return linear(x, W_enc, b_enc)

    def _affine(
        self, x: Tensor, center: Tensor | None, support: Support | None, known: Tensor | None, product: Product
    ) -> Tensor:
        return affine(x, center, self.W_enc, self.b_enc, support, known, product)

    def _all_pre(self, x_centred: Tensor) -> Tensor:
        product = product_on(x_centred.device, self.encoder_product)
        if product != "bfloat16":
            with matrix_units(product):
                return self._linear(x_centred, self.W_enc, self.b_enc)
        low = torch.bfloat16
        return self._linear(x_centred.to(low), low_copy(self.W_enc), self.b_enc.to(low))

    def _known(self, pre_all: Tensor, support: Support | None) -> Tensor | None:
        if support is None:
            return pre_all.to(self.W_enc.dtype)
        if pre_all.dtype != self.W_enc.dtype:
            return None
        return pre_all.view(-1)[support.flat]


def rebuild(codes: Codes, W_dec: Tensor, b_dec: Tensor, side: Side) -> Tensor:
    """codes W_dec + b_dec over all latents, whichever process holds them."""
    if side.latents.is_whole:
        return codes.decode(W_dec, b_dec)
    return side.latents.join(codes.decode(W_dec)) + b_dec


def tied_weights(num_latents: int, d_in: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Encoder and decoder that start equal, with random rows of length one."""
    W_dec = functional.normalize(torch.randn(num_latents, d_in, generator=generator), dim=1)
    return W_dec.clone(), W_dec
