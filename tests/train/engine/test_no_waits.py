"""No step of any variant waits for a GPU: it reads nothing on the host and takes no shape from values.
Nor does it add the floats of a vector one after the other, which a GPU does in another order each time, and on a CPU
no sum is in the order in which threads come to it.

Without a GPU a step runs with the GPU's branches on CPU tensors, and every operation is looked at. What the SAE's
generator draws lies on the host, and may be read there. With one, CUDA itself refuses to wait.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.kit.variant_registry import names
from saemill.train.parallel.sums_over_processes import Ranks
from saemill.train.sae.extra_modules import retired_of
from saemill.train.sae.kernels import hardware

pytest.importorskip("triton")

from saemill.train.sae.kernels.triton import exact_top_k

from .conftest import top_latents, top_of_batch

ROOT = Path(hardware.__file__).parents[3]
READ = "aten._local_scalar_dense"
READS = (READ, "aten.nonzero", "aten.masked_select", "aten.bincount", "aten.unique", "aten._unique")
UPLOADS = ("aten.lift_fresh",)  # numbers of the host made a tensor, which `hardware.send` alone does without a wait
ROWS, WINDOW_ROWS = 8, 36  # few: interpreted kernels are slow; these are of two windows
WARM = 20  # steps that schedules have behind them, so that every term counts

SOFT = {"mask": "soft", "progressive": (0.1, 0.9), "learned_coefficient": True}
MORE: dict[str, dict[str, Any]] = {
    "ortsae": {"every_steps": 1},
    "clt": {"hook": "mlp_in"},
    "treesae": {"move_every_fraction": 1.0},
    "jumprelu settings": {"sparsity": "tanh", "frequency_penalty": 0.1},
    "attention nearest": {"base": "topk", "links": "nearest"},
    "attention same_token": {"base": "topk", "links": "same_token"},
    "attention encoder": {"guidance": "encode", "alpha": 0.0, "shuffle_attention": True, "rank": 2},
    "tiered topk": {"base": "topk", "moves_every_steps": 1000, "curriculum": (0.0, 0.1, 0.2), "tier_norm": True},
    "tiered resampled": {"resample_every_steps": 1, "resample_until": 1.0},
    "tiered norms": {"importance": "uncertainty", "tier_grad_norms": True, "gradient_scaling": True},
    "positional ranges": {"mask": "none", "range_encoders": True, "position_embeddings": True, "adapters": True},
    "positional features": {
        "mask": "none",
        "range_encoders": True,
        "independent_encoders": True,
        "adapters": True,
        "adapters_on": "features",
        "pre_norm": True,
        "norm_rectified": True,
    },
    "temporal topk": {
        "base": "topk",
        "adaptive": "gradient",
        "gradient_noise": 0.1,
        "buffer_mixing": 0.5,
        "buffer_std": 0.1,
    },
    "temporal batchtopk": {"base": "batchtopk", "adaptive": "variance", "position_gate": True, "gradient_noise": 0.1},
    "temporal apart": {"base": "topk", "other_windows": True},
    "positional scattered": {"base": "topk", "scattered": True, **SOFT},
    "temporal pruned": {"prune_share": 0.1, "prune_from": 0.1, "prune_every_steps": 1, "reconstruction_boost": 1.0},
}
CASES = {name: {} for name in names()} | MORE
ON_A_GPU = CASES | {  # what each adds is in another case too: interpreted, it is not worth its time
    "attention topk": {"base": "topk"},
    "hierarchical topk": {"base": "topk"},
    "positional topk": {"base": "topk", **SOFT},
}


class NoWaits(TorchDispatchMode):
    """Refuses, with its place in the code, whatever a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: list[torch.Tensor] = []  # by the generator; kept, so that no other tensor gets their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        reason = self._reason(name, args, kwargs)
        assert reason is None, f"{name} {reason}, at {_place()}"
        result = func(*args, **kwargs)
        if kwargs.get("generator") is not None or "generator" in name:
            self._drawn.append(result)
        return result

    def _reason(self, name: str, args: Any, kwargs: Any) -> str | None:
        if name.startswith(READ) and args[0].data_ptr() in {drawn.data_ptr() for drawn in self._drawn}:
            return None
        if name.startswith(READS):
            return "is read on the host, or has a shape that depends on values"
        if name.startswith(("aten.index.Tensor", "aten.index_put")):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            return "indexes by a mask" if masks else None
        if name.startswith("aten.cumsum") and args[0].ndim == 1 and args[0].is_floating_point():
            return "is not of the same bits each time"
        if "repeat_interleave" in name and kwargs.get("output_size") is None:
            return "has no output_size"
        if name.startswith(UPLOADS) and not any("hardware.py" in frame.filename for frame in _frames()):
            return "goes to the device from the host's own memory"
        return None


class SumsInOrder(TorchDispatchMode):
    """Refuses sums that several threads of a CPU make in an order of their own, which torch's are from 32,768 entries
    on: two numbers or more that are added in one place by `index_put`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(("aten.index_put", "aten._index_put")) and args[3:4] == (True,):
            counts = torch.zeros(args[0].shape), args[1], (args[2] != 0).float(), True
            most = int(torch.ops.aten.index_put(*counts).max())
            assert most < 2, f"{most} numbers are added by {func} into {tuple(args[0].shape)}, at {_place()}"
        return func(*args, **(kwargs or {}))


def _frames() -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_stack() if str(ROOT / "train") in frame.filename]


def _place() -> str:
    return " < ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in _frames()[::-1][:4]) or "backward"


def warmed(battery: Any, case: str, device: str = "cpu", **shared: Ranks) -> tuple[Trainee, Batch]:
    """A trainee in the middle of a run, some of its latents dead, and a batch for its next step."""
    settings = ON_A_GPU[case]
    config = battery.quick(case.split()[0], width=24, k=3, target_l0=3.0, **settings)
    assert all(getattr(config, name) == value for name, value in settings.items())
    trainee = Trainee(case, config.build(battery.D), battery.STEPS, device, **shared)
    drawn = battery.batches(config, 2, rows=WINDOW_ROWS if config.needs().windows else ROWS)
    first, then = (batch.map(lambda tensor: tensor.to(device)) for batch in drawn)
    trainee.step(first)
    trainee.step_index = WARM + 1
    trainee.counters.tokens_since_fired[:4] = 10**9
    trainee.counters.list_dead(10**8, retired_of(trainee.sae, {}))
    assert len(trainee.counters.listed.latents) > 0  # lists are made, and waited for, at looks
    return trainee, then


@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_on_the_host(as_on_gpu, quick_selection, battery, case):
    trainee, batch = warmed(battery, case)
    with NoWaits():
        report = trainee.step(batch)
    assert all(torch.isfinite(torch.tensor(value)) for value in report.scalars().values())


@pytest.mark.parametrize("case", ON_A_GPU)
def test_no_step_adds_in_the_order_of_threads(battery, case):
    trainee, batch = warmed(battery, case)
    with SumsInOrder():
        trainee.step(batch)


@pytest.mark.parametrize("case", ["hierarchical topk", "positional ranges"])
def test_two_threads_train_to_the_same_bits_twice(battery, case):
    config = battery.quick(case.split()[0], **ON_A_GPU[case])
    batches = battery.batches(config, 2, rows=1200)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, again = (Trainee(case, config.build(battery.D), battery.STEPS) for _ in range(2))
        for trainee in (one, again):
            for batch in batches:
                trainee.step(batch)
    finally:
        torch.set_num_threads(threads)
    found = again.state()
    assert [name for name, tensor in one.state().items() if not torch.equal(tensor, found[name])] == []


def test_no_selection_reads_on_the_host():
    """Those of the kernels, which agree with what stands in for them above."""
    pre = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with NoWaits():
        found = (exact_top_k.top_latents(pre, 2), *exact_top_k.top_of_batch(pre, 7))
    for ours, expected in zip(found, (top_latents(pre, 2), *top_of_batch(pre, 7)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU)
def test_no_step_waits_for_the_gpu(battery, case):
    trainee, batch = warmed(battery, case, "cuda")
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        report = trainee.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(torch.tensor(value)) for value in report.scalars().values())


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: torch.bincount(x.long().clamp_min(0)), "bincount"),
        (lambda x: torch.tensor([1.0]), "lift_fresh"),
        (lambda x: x.cumsum(0), "same bits"),
        (lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)), "output_size"),
    ],
)
def test_what_waits_is_seen(wait, message):
    x = torch.ones(4)
    with NoWaits(), pytest.raises(AssertionError, match=message):
        wait(x)
