"""Adam: its settings, and its state as plain named tensors.

One fused call updates all parameters except tables that a GPU kernel updates one row at a time. That kernel also keeps
rows at length one; elsewhere `UnitDecoder` (`terms/constraints.py`) does. The step count and the two moments are the
only state, so a checkpoint is a flat dictionary of tensors and a resumed run continues to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.optim.adam import adam

from ..errors import ConfigInvalid
from ..parallel.dictionary_over_processes import ALL_LATENTS, Latents
from ..sae.kernels.hardware import reads_at_once, write_numbers
from ..sae.kernels.row_gradients import RowGradient, RowUpdates, take_rows
from .schedules import Constant, Decay, Onset, Product, Schedule

Start = Literal["fitted", "drawn"]
BETA1, EPSILON = 0.9, 1e-8  # Adam's own defaults, unless the user or the variant sets others


@dataclass(frozen=True)
class Optim:
    """Settings of the optimiser and its learning rate."""

    lr: float | None = None
    """Peak learning rate; None: the variant's default, scaled by width if its paper does so."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises, at most warmup_max_fraction of the run."""
    warmup_max_fraction: float = 0.1
    """1: always warmup_steps, however short the run."""
    warmup_power: float = 1.0
    """1: linear; 3: cubic, slow at first."""
    decay_fraction: float = 0.2
    """Share of the run, at the end, over which the learning rate falls linearly to zero."""
    beta1: float | None = None
    """None: the variant's default, 0.9 for most."""
    beta2: float = 0.999
    epsilon: float | None = None
    """None: the variant's default, 1e-8 for most."""
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Largest norm of all gradients together; None: no clipping."""
    start: Start = "fitted"
    """fitted: adjust the initial weights to reconstruct the first batch; drawn: leave them as drawn."""

    def __post_init__(self) -> None:
        for name in ("lr", "epsilon", "clip_norm", "warmup_power"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigInvalid(f"optim.{name}: expected a positive number, found {value}")
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigInvalid(f"optim.{name}: expected 0 or more, found {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigInvalid(f"optim.{name}: expected 0 <= {name} < 1, found {value}")
        for name in ("decay_fraction", "warmup_max_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigInvalid(f"optim.{name}: expected 0 to 1, found {value}")

    def schedule(self) -> Schedule:
        """The learning rate of every step; `lr` must be set."""
        assert self.lr is not None
        rise = Onset(0, self.warmup_steps, self.warmup_max_fraction, self.warmup_power)
        return Product((Constant(self.lr), rise, Decay(self.decay_fraction)))


class Adam:
    """Adam over named parameters; call `begin`, then `step`.

    `by_row` maps tables that are updated row by row to whether their rows are kept at length one; `split` names the
    parameters of which this process holds only the rows of its own latents.

    On a GPU `step` involves only the device and can be recorded: the learning rate is in device memory, where `begin`
    writes it, and so is the step count of each table.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Optim,
        lr_scales: Mapping[str, float] | None = None,
        by_row: Mapping[str, bool] | None = None,
        latents: Latents = ALL_LATENTS,
        split: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self._by_row = {name: (take_rows(self.parameters[name]), is_unit) for name, is_unit in (by_row or {}).items()}
        self.settings = settings
        self._latents, self._split = latents, split
        self._beta1 = BETA1 if settings.beta1 is None else settings.beta1
        self._epsilon = EPSILON if settings.epsilon is None else settings.epsilon
        self._lr_scales = dict(lr_scales or {})
        self._first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._steps = {name: torch.zeros((), device=p.device) for name, p in self.parameters.items()}
        self._lr: dict[float, float | Tensor] = {}  # the current step's rate, by its multiple
        scales = dict.fromkeys(self._lr_scales.get(name, 1.0) for name in self.parameters)
        self._rates: Tensor | None = None
        first = next(iter(self.parameters.values()), None)
        if first is not None and not reads_at_once(first):
            # Four per row: a kernel's arguments must start at a multiple of 16 bytes.
            self._rates = torch.zeros(len(scales), 4, device=first.device)
            self._lr = dict(zip(scales, self._rates[:, 0], strict=True))
            self._betas = torch.tensor([self._beta1, settings.beta2], dtype=torch.float64).to(first.device)
        self._scales = list(scales)

    def begin(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        if self._rates is None:
            self._lr = {scale: lr * scale for scale in self._scales}
        else:
            write_numbers(self._rates, [(lr * scale, 0.0, 0.0, 0.0) for scale in self._scales])

    @torch.no_grad()
    def step(self, frozen: Tensor | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; return the norm of all gradients if it is clipped.

        If `frozen` is not zero, nothing changes: on a GPU a non-finite loss sets it before the host has seen the loss.
        """
        for name, (updates, is_unit) in self._by_row.items():
            if updates.gradients or self.parameters[name].grad is not None:
                self._update_by_row(name, updates, is_unit, frozen)
        names = [name for name, p in self.parameters.items() if p.grad is not None and name not in self._by_row]
        if not names:
            return None
        gradients = [cast(Tensor, self.parameters[name].grad) for name in names]
        norm, divisor = self._clip(names, gradients)
        scales = [self._lr_scales.get(name, 1.0) for name in names]
        for scale in dict.fromkeys(scales):
            together = [index for index, own in enumerate(scales) if own == scale]
            self._update_fused([names[i] for i in together], [gradients[i] for i in together], scale, divisor, frozen)
        return norm

    def _update_by_row(self, name: str, updates: RowUpdates, is_unit: bool, frozen: Tensor | None) -> None:
        """Update one table with the kernel that sums gradients, applies Adam and writes one row at a time."""
        from ..sae.kernels.triton.row_update import AdamStep, update_rows

        table, settings = self.parameters[name], self.settings
        assert self._rates is not None
        lr = self._rates[self._scales.index(self._lr_scales.get(name, 1.0))]
        self._steps[name] += 1 if frozen is None else 1 - frozen
        bias = 1 - self._betas ** self._steps[name]
        if updates.low is None and updates.is_low_read:
            updates.low = torch.empty_like(table, dtype=torch.bfloat16)
        dense = _dense_part(table.grad, updates.gradients[1:])
        first = updates.gradients[0] if updates.gradients else None
        update_rows(
            table,
            (self._first[name], self._second[name]),
            None if first is None else (*first.entries(), first.rows.contiguous()),
            AdamStep(lr, bias, self._beta1, settings.beta2, self._epsilon, settings.weight_decay),
            frozen,
            dense=dense,
            low=updates.low,
            unit=is_unit,
        )
        updates.low_version = table._version

    def _update_fused(
        self, names: list[str], gradients: list[Tensor], scale: float, divisor: Tensor | None, frozen: Tensor | None
    ) -> None:
        """One fused update of parameters that share a learning rate."""
        tables = (self.parameters, self._first, self._second)
        parameters, first, second = ([table[name] for name in names] for table in tables)
        settings = self.settings
        adam(
            parameters,
            gradients,
            first,
            second,
            [],
            [self._steps[name] for name in names],
            fused=True,
            grad_scale=divisor,
            found_inf=frozen,
            amsgrad=False,
            beta1=self._beta1,
            beta2=settings.beta2,
            lr=self._lr[scale],
            weight_decay=settings.weight_decay,
            eps=self._epsilon,
            maximize=False,
        )

    def places(self) -> tuple[int, ...]:
        """Addresses of the parameters, and versions of those that have a bfloat16 copy."""
        own = (parameter.data_ptr() for parameter in self.parameters.values())
        return *own, *(self.parameters[name]._version for name in self._by_row)

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The two moments of a parameter themselves, not copies."""
        (name,) = (name for name, own in self.parameters.items() if own is parameter)
        return self._first[name], self._second[name]

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        for updates, _ in self._by_row.values():
            updates.gradients.clear()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name."""
        state: dict[str, Tensor] = {}
        for name in self.parameters:
            state[f"{name}.first_moment"] = self._first[name]
            state[f"{name}.second_moment"] = self._second[name]
            state[f"{name}.steps"] = self._steps[name]
        return state

    def _clip(self, names: list[str], gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The norm of the gradients, and the divisor for the fused update."""
        if self.settings.clip_norm is None:
            return None, None
        # By row first: over a whole table a CPU adds too many squares to each float32 (of 2^27 it loses 2 %).
        norms = [vector_norm(vector_norm(gradient, dim=-1)) for gradient in gradients]
        if not self._latents.is_whole:
            is_split = [name in self._split for name in names]
            squares = [norm.square() * split for norm, split in zip(norms, is_split, strict=True)]
            totals = self._latents.sum(torch.stack(squares)).sqrt()
            norms = [total if split else norm for norm, total, split in zip(norms, totals, is_split, strict=True)]
        norm = vector_norm(torch.stack(norms))
        return norm, (norm / self.settings.clip_norm).clamp_min(1.0)


def _dense_part(gradient: Tensor | None, further: list[RowGradient]) -> Tensor | None:
    """The dense gradient of a table plus that of all supports but the first, which the kernel adds itself."""
    total = gradient
    for part in further:  # one table at a time: a wide dictionary has no room for several
        total = part.table() if total is None else total.add_(part.table())
    return total
