"""A step on a GPU of which only shapes, types and places exist: every tensor lies there, and none is read on the host.

torch's fake tensors say of each operation what a real GPU would refuse: operands on different devices, a number read
back, a shape that depends on values. The kernels of Triton are replaced by the shapes that they give. A torch without
CUDA has no gradients of fake tensors that lie there, so the device is one of the kind that torch leaves to others;
it stays in a process once it is made known, so these tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections import deque
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import backend_registration

from saemill.train.engine.adam import Adam
from saemill.train.engine.step import Trainee, _lr_scales
from saemill.train.errors import ConfigInvalid
from saemill.train.parallel import processes
from saemill.train.parallel.sums_over_processes import Reduction
from saemill.train.sae.extra_modules import StepCounter
from saemill.train.sae.kernels import dense_products, hardware
from saemill.train.terms.constraints import GradientNoise
from saemill.train.terms.tiers import Tiers

pytest.importorskip("triton")

from saemill.train.sae.kernels.triton import row_update, sparse_products

from .test_no_waits import CASES, warmed

NAME = "fake"
SOME = (
    "topk",
    "batchtopk",
    "jumprelu",
    "matryoshka",
    "hierarchical",
    "tiered topk",
    "positional",
    "temporal topk",
    "ortsae",
)
REGISTER = "_setup_privateuseone_for_python_backend"
WANTED_BY = {"": (), "some": SOME, "all": tuple(CASES)}
WANTED = WANTED_BY[os.environ.get("FAKE_GPU", "")]
if WANTED:
    getattr(backend_registration, REGISTER)(NAME)
    GPU = torch.device(NAME, 0)


class Card(FakeTensorMode):
    """But that what the SAE's generator draws lies on the host, and may be read there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_read = func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor)
        if is_read or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and not isinstance(args[0], FakeTensor):
            args = (self.from_tensor(args[0]),)  # or torch would copy its numbers, for which there is no device
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def shapes_of_kernels(monkeypatch, quick_selection):
    def lies_there(*parts: Any) -> None:
        places = {part.device for part in parts if isinstance(part, Tensor)}
        assert places <= {GPU}, f"a kernel is given tensors on {places}"

    def bag_sum(table, indices, offsets, weights):
        lies_there(table, indices, offsets, weights)
        return table.new_empty(len(offsets) - 1, table.shape[1], dtype=torch.float32)

    def pair_dots(left, left_index, right, right_index, order):
        lies_there(left, left_index, right, right_index, order)
        return left.new_empty(len(left_index), dtype=torch.float32)

    def segment_sum(values, offsets):
        lies_there(values, offsets)
        return values.new_empty(len(offsets) - 1, dtype=torch.float32)

    def update_rows(weights, moments, entries, adam, frozen=None, *, dense=None, low=None, unit=False):
        lies_there(weights, *moments, *(entries or ()), frozen, dense, low)

    monkeypatch.setattr(hardware, "SERVED", {NAME})
    monkeypatch.setattr(hardware, "has_triton", lambda device: True)
    monkeypatch.setattr(dense_products, "has_fast_bfloat16", lambda kind: True)
    for module, kernel in (
        (sparse_products, bag_sum),
        (sparse_products, pair_dots),
        (sparse_products, segment_sum),
        (row_update, update_rows),
    ):
        monkeypatch.setattr(module, kernel.__name__, kernel)
    hardware._kept.cache_clear()
    monkeypatch.setattr(GradientNoise, "_noise", lambda self, parameter: torch.zeros_like(parameter))  # a GPU's own


class Move:
    """Tensors, and what holds them, on the fake GPU."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode, self._known = mode, {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {name: self(part) for name, part in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if is_dataclass(value) and not isinstance(value, type):
            return type(value)(*(self(getattr(value, field.name)) for field in fields(value)))
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._known:
            fake = self._mode.from_tensor(tensor.detach()).to(GPU)
            fake = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            self._known[id(tensor)] = tensor, fake
        return self._known[id(tensor)][1]

    def module(self, module: nn.Module) -> None:
        """What `Module.to` moves, and what steps have kept of it."""
        for own in (module._parameters, module._buffers):
            own.update({name: self(tensor) for name, tensor in own.items()})
        if isinstance(module, StepCounter) and module._seen is not None:
            module._seen = module.steps, module.steps._version, module._seen[2]
        if isinstance(module, Tiers) and module._tiering is not None:
            tiering = module._tiering[1]
            for name, part in vars(tiering).items():
                setattr(tiering, name, self(part))
            module._tiering = module.membership._version, tiering


def move(trainee: Trainee, to: Move) -> None:
    """A trainee as it would be on a GPU."""
    sae, assembly = trainee.sae, trainee.assembly
    for module in sae.modules():
        to.module(module)
    trainee.device, trainee._looks_late, trainee._frozen = GPU, True, torch.zeros((), device=GPU)
    trainee._weights = to(trainee._weights)
    by_row = trainee._tables_by_row()
    trainee._constraints = [c for c in assembly.constraints if not (by_row and c.table_use == "unit decoder")]
    own = trainee.latents, trainee._split
    trainee.optimiser = Adam(dict(sae.named_parameters()), assembly.optim, _lr_scales(sae), by_row, *own)
    if trainee._reduction is not None:
        trainee._reduction = Reduction(sae.parameters(), trainee.ranks)
    trainee.optimiser._lr = dict.fromkeys(trainee.optimiser._scales, 0.1)  # torch has no fake update of one there
    trainee._traces = deque()
    counters = trainee.counters
    counters.list_length()
    counters.tokens_since_fired, counters._marked = to(counters.tokens_since_fired), to(counters._marked)
    counters._order = to(counters._order)


SUMMED = {torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}
SELECTIONS = {"topk_batch", "split_topk"}  # documented in `engine/step.py`


@pytest.fixture
def two_processes(monkeypatch):
    """This process and one with the same rows. What NCCL does not take is refused: tensors of the host, which gloo
    sends, and such as are strided or of a type that it cannot add."""

    def take(group: str | None, *tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.device == (GPU if group is None else torch.device("cpu")), f"{tensor.device} through {group}"
            assert tensor.is_contiguous() and tensor.dtype in SUMMED and tensor.shape == tensors[0].shape

    def all_reduce(tensor: Tensor, group: str | None, async_op: bool = False) -> Any:
        take(group, tensor)
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def all_gather(parts: list[Tensor], tensor: Tensor, group: str | None) -> None:
        take(group, tensor, *parts)
        for part in parts:
            part.copy_(tensor)

    monkeypatch.setattr(processes, "dist", SimpleNamespace(all_reduce=all_reduce, all_gather=all_gather))
    found = processes.Processes.__new__(processes.Processes)
    found.rank, found.size, found._host = 0, 2, "host"
    return found


@pytest.mark.parametrize("case", WANTED)
@pytest.mark.parametrize("kind", ["ranks", "split"])
def test_what_processes_exchange_lies_on_the_gpu(battery, shapes_of_kernels, two_processes, case, kind):
    """And a step waits for nothing but its selection."""
    try:
        trainee, batch = warmed(battery, case, **{kind: two_processes})
    except ConfigInvalid as error:
        assert kind == "split" and "parts that need all latents" in str(error)
        return
    with Card(allow_non_fake_inputs=True) as mode:
        to = Move(mode)
        move(trainee, to)
        try:
            report = trainee.step(to(batch))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            assert SELECTIONS & {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            return
        assert {value.device for value in report.measured.values()} == {GPU}


@pytest.mark.parametrize("case", WANTED)
def test_every_tensor_of_a_step_lies_on_the_gpu(battery, shapes_of_kernels, case):
    trainee, batch = warmed(battery, case)
    with Card(allow_non_fake_inputs=True) as mode:
        to = Move(mode)
        move(trainee, to)
        report = trainee.step(to(batch))
        assert {value.device for value in report.measured.values()} == {GPU}


@pytest.mark.skipif(not hasattr(backend_registration, REGISTER), reason="this torch has no such back ends")
@pytest.mark.parametrize("cases", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_in_a_process_of_its_own(cases):
    words = ["-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", "lies_on_the_gpu"]
    environment = os.environ | {"FAKE_GPU": cases}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"{3 * len(WANTED_BY[cases])} passed" in done.stdout, done.stdout[-3000:]
