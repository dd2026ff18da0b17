"""One training step of one SAE, and everything that a resumed run needs to continue.

The device's part of a step is `_work`, which a GPU may record and replay (`cuda_graph_replay.py`).

On a GPU the host looks at losses only every LOOK_EVERY steps; other steps do not wait for the device. Between looks a
non-finite loss freezes the weights on the device, and the list of dead latents is that of the last look. These still
wait: the selection of a dictionary split by latents; a batch top-k where processes share the rows; a step in which
latents of treesae change parents; one in which those of `tiered` move, and the next; a refit of pca.

No step reads global random state, so an SAE trains to the same bits in a fleet as alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.device_copies import fetch
from ..errors import NonFiniteLoss, StateInvalid
from ..parallel.dictionary_over_processes import Latents, SomeLatents
from ..parallel.sums_over_processes import ONE_PROCESS, BatchRanks, Ranks, Reduction, share_batch
from ..sae.extra_modules import Part, extras_of, retired_of
from ..sae.kernels.dense_products import dot
from ..sae.kernels.hardware import reads_at_once, runs_triton, write_numbers
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import Side
from ..sae.step_view import View
from .adam import Adam
from .count_dead_latents import LatentCounters
from .cuda_graph_replay import Measured, Replays
from .first_weights_from_data import fit_start
from .terms_and_constraints import Assembly, keep_own_latents, require_splittable, split_parameters, split_state

LOOK_EVERY = 16  # steps between two looks at a GPU; a look costs one wait, and listing the dead latents another
RECORDS = {"cuda"}  # device types whose launches can be recorded
WIDEST_ROW = 16384  # the widest row that a table updated row by row may have: one program holds it in registers
LOOKED_AT = "looked at: "  # prefix of measurements kept for the next look


@dataclass(frozen=True, eq=False)
class Report:
    """What one step reports, under the names of the log."""

    weight: float  # weight of this rank in a mean over ranks
    measured: Measured
    known: dict[str, float]  # values decided by the host

    def scalars(self) -> dict[str, float]:
        """All values, brought to the host in one transfer."""
        numbers = torch.stack([value.double() for value in self.measured.values()]).tolist()
        return dict(zip(self.measured, numbers, strict=True)) | self.known


class Trainee:
    """An SAE in training."""

    def __init__(
        self,
        name: str,
        assembly: Assembly,
        total_steps: int,
        device: torch.device | str = "cpu",
        ranks: Ranks = ONE_PROCESS,
        split: Ranks | None = None,
    ) -> None:
        """`ranks` divide the rows of a batch; the processes of `split` see all rows and hold some latents each."""
        self.name = name
        self.assembly = assembly
        self.total_steps = total_steps
        self.device = torch.device(device)
        self.ranks = ranks
        self.sae = assembly.sae
        self.sae.extras.update(dict(assembly.extras))
        self.latents = Latents(self.sae.num_latents)
        self._split: tuple[str, ...] = ()
        self._split_state: set[str] = set()  # tensors of the state that cover only the latents of this process
        if split is not None and split.size > 1:
            require_splittable(name, assembly)
            self.latents, self._split = SomeLatents(split, self.sae.num_latents), split_parameters(self.sae)
            self._split_state = split_state(self._split)
            keep_own_latents(self.sae, self._split, self.latents)
        self.sae.to(self.device)
        by_row = self._tables_by_row()
        # The kernel that updates decoder rows keeps them at length one itself.
        self._constraints = [c for c in assembly.constraints if not (by_row and c.table_use == "unit decoder")]
        self.optimiser = Adam(
            dict(self.sae.named_parameters()), assembly.optim, _lr_scales(self.sae), by_row, self.latents, self._split
        )
        self._reduction = Reduction(self.sae.parameters(), self.ranks) if self.ranks.size > 1 else None
        self.counters = LatentCounters(self.sae.num_latents, self.device)
        self.step_index = 0
        self._lr = assembly.rate
        self._looks_late = not reads_at_once(self.sae.b_enc)
        self._traces: deque[tuple[int, Measured]] = deque(maxlen=LOOK_EVERY)  # steps not looked at yet
        self._frozen = torch.zeros((), device=self.device) if self._looks_late else None
        # The weights of the terms' losses, where a recorded step reads them.
        self._weights = torch.zeros(len(assembly.terms), device=self.device) if self._looks_late else None
        self._random_state = assembly.generator.get_state()  # at the start of this step
        is_recordable = (
            self.device.type in RECORDS
            and runs_triton(self.sae.b_enc)  # with torch's own kernels the host reads the selection
            and self.ranks.size == 1
            and self.latents.is_whole
            and all(extra.is_recordable for extra in extras_of(self.sae))
        )
        self.replays = Replays(name, is_recordable, assembly.generator, self._undo)

    def step(self, batch: Batch) -> Report:
        knobs = self.assembly.knobs_at(self.step_index, self.total_steps)
        if self._looks_late and self.step_index % LOOK_EVERY == 0:
            self.look()
            self.counters.list_dead(self.assembly.dead_after_tokens, retired_of(self.sae, knobs))
        ranks = share_batch(self.ranks, batch.x.shape[0])
        if self.step_index == 0 and self.assembly.optim.start == "fitted":
            fit_start(self.assembly, batch, self.total_steps, ranks, self.latents)
        lr = self._lr(self.step_index, self.total_steps)
        weights = {term.name: term.weight(self.step_index, self.total_steps) for term in self.assembly.terms}
        self.optimiser.begin(lr)
        if self._weights is not None:
            write_numbers(self._weights, list(weights.values()))
        measured = self._launch_or_replay(batch, weights, knobs, ranks)
        self.step_index += 1
        known = {f"weight/{name}": weight for name, weight in weights.items()}
        known |= {f"knob/{name}": knob for name, knob in knobs.items()}
        return Report(ranks.weight, measured, known | {"lr": lr})

    def _launch_or_replay(
        self, batch: Batch, weights: Mapping[str, float], knobs: Mapping[str, float], ranks: BatchRanks
    ) -> Measured:
        """Run the device's part of this step and return its measurements."""
        self._random_state = self.assembly.generator.get_state()
        key: tuple[Hashable, ...] = ()
        if self.replays.is_possible:
            # All that `_work` takes from the host, and the tensors that it reads and changes.
            counted = (name for name, weight in weights.items() if weight != 0.0)
            buffers = (buffer.data_ptr() for buffer in self.sae.buffers())
            key = *counted, *knobs.items(), self.counters.list_length(), *self.optimiser.places(), *buffers
        measured = self.replays.take(batch, key, lambda rows: self._work(rows, weights, knobs, ranks))
        if self._looks_late:
            names = [name for name in measured if name.startswith(LOOKED_AT)]
            self._traces.append((self.step_index, {name.removeprefix(LOOKED_AT): measured.pop(name) for name in names}))
        return measured

    def _work(
        self, batch: Batch, weights: Mapping[str, float], knobs: Mapping[str, float], ranks: BatchRanks
    ) -> Measured:
        """The device's part of a step. To be recordable, it may depend on no host value that the key lacks."""
        view = self._view(batch, Side(batch.side, knobs, ranks, self.latents))
        # Reported values are measured here, before the weights change.
        # A term of weight zero is not computed: it costs nothing and draws no random numbers.
        losses = {term.name: term.fn(view) for term in self.assembly.terms if weights[term.name] != 0.0}
        factors = weights if self._weights is None else dict(zip(weights, self._weights.unbind(), strict=True))
        own_loss = loss = _weighted_sum(losses, factors)
        if not self.latents.is_whole:
            losses = self._sum_parts(losses)
            loss = _weighted_sum(losses, factors)
        measured = self._require_finite(view, loss, losses) | {"loss": loss.detach()}
        with torch.no_grad():
            unexplained = dot(view.residual, view.residual) / view.x.shape[0] / view.stats.variance
            measured["l0"] = self.latents.sum(view.codes.l0)
            measured["explained_variance"] = 1.0 - unexplained
            measured["dead_share"] = self.latents.sum(view.dead.double().sum()) / self.latents.total
        measured |= {f"loss/{name}": value.detach() for name, value in losses.items()}
        # A rank with more rows counts more; in a single process the weight is 1 and changes no bit.
        if self._reduction is not None:
            self._reduction.begin()
        own_loss.backward(torch.full_like(own_loss, ranks.weight / ranks.size))
        grad_norm = self._update()
        with torch.no_grad():
            self.sae.gate.observe(view.codes, view.side)
            self.counters.update(view.fired, ranks.rows(view.x.shape[0]))
            for extra in extras_of(self.sae):
                extra.observe(view)
        return measured | view.notes | ({} if grad_norm is None else {"grad_norm": grad_norm})

    def _undo(self) -> None:
        """Undo the host's part of a step that did not run on the device."""
        self.optimiser.zero_grad()
        self.assembly.generator.set_state(self._random_state)

    def state(self) -> dict[str, Tensor]:
        """Everything that a bit-exact resume needs, as flat named tensors in host memory.

        On a CPU they are the live tensors, which the next step changes. If the SAE is split by latents, this is a
        collective call, and only the first process, which saves them, gets whole tables.
        """
        self.look()
        whole = {
            name: self.latents.whole(tensor) if name in self._split_state else tensor
            for name, tensor in fetch(self._own_state()).items()
        }
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    @property
    def state_bytes(self) -> int:
        """Size of `state`, with the latents of all processes."""
        state = self._own_state()
        return sum(math.prod(self._whole_shape(name, own)) * own.element_size() for name, own in state.items())

    @contextmanager
    def gather_weights(self) -> Iterator[None]:
        """A collective context in which the first process has all latents, to measure and save but not to train."""
        parts = {**dict(self.sae.named_parameters()), "counters": self.counters.tokens_since_fired}
        parts = {name: parts[name] for name in (*self._split, "counters")} if self._split else {}
        own = {name: tensor.data for name, tensor in parts.items()}
        for tensor in parts.values():
            whole = self.latents.whole(tensor.data)
            if whole is not None:
                tensor.data = whole.to(self.device)
        try:
            yield
        finally:
            for name, tensor in parts.items():
                tensor.data = own[name]

    def _own_state(self) -> dict[str, Tensor]:
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        state |= {f"adam.{name}": tensor for name, tensor in self.optimiser.state().items()}
        state |= {f"latents.{name}": tensor for name, tensor in self.counters.state().items()}
        state["generator"] = self.assembly.generator.get_state()
        state["step"] = torch.tensor(self.step_index)
        return {name: tensor.detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state()` returned."""
        own = self._own_state()
        problems = [f"{name} is missing" for name in own.keys() - state.keys()]
        problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
        shapes = {name: self._whole_shape(name, tensor) for name, tensor in own.items()}
        problems += [
            f"{name}: expected shape {shapes[name]}, found {tuple(state[name].shape)}"
            for name in own.keys() & state.keys()
            if shapes[name] != tuple(state[name].shape)
        ]
        if problems:
            raise StateInvalid(f"{self.name}: the saved state does not match: {'; '.join(sorted(problems))}")
        for name, tensor in own.items():
            tensor.copy_(self.latents.own(state[name]) if name in self._split_state else state[name])
        self.counters.after_load()
        self.replays.forget()
        self.assembly.generator.set_state(state["generator"].cpu())
        self.step_index = int(state["step"])

    def _whole_shape(self, name: str, own: Tensor) -> tuple[int, ...]:
        """The shape of a tensor of the state with the latents of all processes."""
        return (self.latents.total, *own.shape[1:]) if name in self._split_state else tuple(own.shape)

    def _sum_parts(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses over all latents, for the log; of a loss split in "parts" each process has computed one. All have
        the same numbers, since these decide whether an SAE stops."""
        parts = {term.name for term in self.assembly.terms if term.split == "parts"}
        own = torch.stack(list(losses.values())).detach()
        alike, summed = self.latents.agree(own), self.latents.sum(own)
        return {name: (summed if name in parts else alike)[at] for at, name in enumerate(losses)}

    def _view(self, batch: Batch, side: Side) -> View:
        assembly = self.assembly
        return View(
            x=batch.x,
            target=batch.x if batch.target is None else batch.target,
            side=side,
            sae=self.sae,
            dead=self.counters.dead(assembly.dead_after_tokens),
            stats=assembly.target_stats,
            generator=assembly.generator,
            retired=retired_of(self.sae, side.knobs),
            list_dead=(lambda: self.counters.listed) if self._looks_late else None,
            residual_by=assembly.residual_by,
            moments=self.optimiser.moments,
            draw_by=self.replays.draw,
        )

    def look(self) -> None:
        """Raise if a step since the last look had a non-finite loss (no-op where each step is checked)."""
        traces = list(self._traces)
        self._traces.clear()
        if not traces:
            return
        sums = torch.stack([torch.stack([trace.pop("loss"), trace.pop("input")]) for _, trace in traces]).tolist()
        for (step, losses), (loss, sum_of_input) in zip(traces, sums, strict=True):
            if not math.isfinite(loss):
                losses = {name: float(value) for name, value in losses.items()}
                raise NonFiniteLoss(step, losses, is_input_finite=math.isfinite(sum_of_input))

    def _require_finite(self, view: View, loss: Tensor, losses: Mapping[str, Tensor]) -> Measured:
        """Check the whole batch's loss, so that all ranks stop or none does; on a GPU, return values for `look`."""
        whole, *means = view.side.ranks.mean(torch.stack([loss, *losses.values()]).detach())
        trace = dict(zip(losses, means, strict=True))
        if self._frozen is not None:
            self._frozen.logical_or_(whole - whole)  # 0, but not a number if the loss is not finite
            trace |= {"loss": whole, "input": view.x.sum()}
            return {LOOKED_AT + name: value for name, value in trace.items()}
        if not math.isfinite(float(whole)):
            self.assembly.generator.set_state(self._random_state)  # as if the step had not been attempted
            raise NonFiniteLoss(self.step_index, {name: float(value) for name, value in trace.items()})
        return {}

    def _update(self) -> Tensor | None:
        if self._reduction is not None:
            self._reduction.finish()
        for constraint in self._constraints:
            constraint.before_step(self.sae)
        grad_norm = self.optimiser.step(self._frozen)
        self.optimiser.zero_grad()
        for constraint in self._constraints:
            constraint.after_step(self.sae)
        return grad_norm

    def _tables_by_row(self) -> dict[str, bool]:
        """The weight tables that a kernel can update row by row, and whether it keeps their rows at length one.

        Empty if anything else needs their gradients: other ranks, clipping by the joint norm, a constraint.
        """
        needs_gradients = self.ranks.size > 1 or self.assembly.optim.clip_norm is not None
        if needs_gradients or any(constraint.table_use == "gradients" for constraint in self.assembly.constraints):
            return {}
        tables = {"W_enc": self.sae.W_enc, "W_dec": self.sae.W_dec}
        if not all(runs_triton(table) and table.shape[1] <= WIDEST_ROW for table in tables.values()):
            return {}
        is_unit = any(constraint.table_use == "unit decoder" for constraint in self.assembly.constraints)
        return {"W_enc": False, "W_dec": is_unit}


def _weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float] | Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()


def _lr_scales(sae: SparseAutoencoder) -> dict[str, float]:
    """Multiples of the learning rate, for the parameters of modules that set one."""
    return {
        f"{path}.{name}": 1.0 if name in module.unscaled else module.lr_scale
        for path, module in sae.named_modules()
        if isinstance(module, Part)
        for name, _ in module.named_parameters()
    }
