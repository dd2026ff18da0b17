"""Steps that are recorded and replayed, as a GPU does by a CUDA graph. Without one a tape stands in for the graph: it
does the recorded operations again on the same tensors, with the numbers that the host had when it was recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from saemill.train.data import device_copies
from saemill.train.data.batch import Batch
from saemill.train.engine import replay, step
from saemill.train.engine.optim import Optim
from saemill.train.engine.step import Trainee
from saemill.train.errors import NonFiniteLoss
from saemill.train.kit.registry import config_type
from saemill.train.sae import gates
from saemill.train.sae.kernels import hardware
from saemill.train.sae.kernels.sparse_support import Support

from .conftest import top_of_batch

D, F, B, STEPS = 8, 24, 12, 40
REFUSED = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount")
RECORDED = ("topk", "batchtopk", "matryoshka", "abstopk", "hierarchical_topk", "jumprelu", "standard", "gated")


class Tape(TorchDispatchMode):
    """Every operation, with what it was given and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(REFUSED):
            raise RuntimeError(f"{func}: not permitted while it is recorded")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def play(self) -> dict[int, Tensor]:
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, result in self.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            pairs = zip(_flat(result), _flat(again), strict=True)
            made |= {id(old): new for old, new in pairs if old is not new}
        return made


def _flat(value: Any) -> list[Tensor]:
    return [part for part in torch.utils._pytree.tree_leaves(value) if isinstance(part, Tensor)]


@pytest.fixture
def taped(monkeypatch):
    """Steps of CPU tensors are looked at late and recorded on a tape; their state stays what it was, as a graph's."""
    is_on = False

    def recorded(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        nonlocal is_on
        owner = next(cell.cell_contents for cell in _cells(work) if isinstance(cell.cell_contents, Trainee))
        kept = [*owner._own_state().values(), owner._frozen, owner.optimiser._numbers]
        before, tape, is_on = [tensor.clone() for tensor in kept], Tape(), True
        try:
            with tape:
                told = work()
        finally:
            is_on = False
            for tensor, value in zip(kept, before, strict=True):
                with torch.no_grad():
                    tensor.copy_(value)
        return lambda: told.copy_(tape.play()[id(told)]), told

    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    monkeypatch.setattr(replay, "RECORDS", {"cpu"})
    monkeypatch.setattr(step, "RECORDS", {"cpu"})
    monkeypatch.setattr(replay, "recorded", recorded)
    monkeypatch.setattr(device_copies, "is_recording", lambda: is_on)
    monkeypatch.setattr(step, "is_recording", lambda: is_on)
    monkeypatch.setattr(step, "LOOK_EVERY", 8)
    # The kernel's selection in torch: the one that serves where there is no kernel waits for its candidates' number.
    monkeypatch.setattr(gates, "support_of_batch", largest_of_batch)


def largest_of_batch(pre: Tensor, count: int) -> Support:
    offsets, latents = top_of_batch(pre, count)
    return Support(offsets, latents, pre.shape[1])


def _cells(work: Callable[[], Tensor], depth: int = 4) -> list[Any]:
    """What a function closes over, and the functions that it closes over."""
    found = list(work.__closure__ or ())
    inner = [cell.cell_contents for cell in found if callable(cell.cell_contents) and depth]
    return found + [cell for part in inner if hasattr(part, "__closure__") for cell in _cells(part, depth - 1)]


def make(variant: str, device: str = "cpu", **settings: Any) -> Trainee:
    config = config_type(variant)(width=F, optim=Optim(start="drawn", warmup_max_fraction=0.5), **settings)
    return Trainee(variant, config.build(D), total_steps=STEPS, device=device)


def batches(count: int, device: str = "cpu") -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(B, D, generator=rng).to(device)) for _ in range(count)]


def assert_alike(ours: Trainee, plain: Trainee) -> None:
    for name, tensor in plain.state().items():
        assert torch.equal(tensor, ours.state()[name]), name


def settings_of(variant: str) -> dict[str, Any]:
    """Few latents are active, and those die that are silent for three steps."""
    known = config_type(variant).__dataclass_fields__
    wanted = {"k": 4, "target_l0": 4.0, "dead_after_tokens": 30}
    return {name: value for name, value in wanted.items() if name in known}


@pytest.mark.parametrize("variant", RECORDED)
def test_replayed_steps_train_to_the_same_bits(taped, variant):
    """Through the learning rate's rise and fall, and with latents that die and are listed anew."""
    ours, plain = make(variant, **settings_of(variant)), make(variant, **settings_of(variant))
    plain.replays.is_possible = False
    replayed = 0
    for batch in batches(STEPS - 5):
        told, expected = ours.step(batch).scalars(), plain.step(batch).scalars()
        assert told == expected
        replayed += ours.replays.is_recorded
    assert ours.replays.refused is None and replayed >= 6
    assert_alike(ours, plain)


def test_what_the_host_draws_is_not_recorded(taped):
    """It would be drawn once; steps go on as they were, to the same bits."""
    ours, plain = make("ortsae", k=4, every_steps=1), make("ortsae", k=4, every_steps=1)
    plain.replays.is_possible = False
    for batch in batches(6):
        assert ours.step(batch).scalars() == plain.step(batch).scalars()
    assert ours.replays.refused is not None and not ours.replays.is_recorded
    assert_alike(ours, plain)


def test_a_recording_holds_for_one_key_only(taped):
    """Another number of rows, another weight of a term: both are launched anew."""
    trainee, rows = make("topk", k=4), batches(12)
    for batch in rows[:4]:
        trainee.step(batch)
    assert trainee.replays.is_recorded
    report = trainee.step(Batch(rows[5].x[:7]))
    assert report.tokens == 7 and not trainee.replays.is_recorded


def test_a_loaded_state_is_trained_on(taped):
    ours, plain = make("topk", k=4), make("topk", k=4)
    plain.replays.is_possible = False
    stream = batches(12)
    for batch in stream[:6]:
        ours.step(batch)
    kept = {name: tensor.clone() for name, tensor in ours.state().items()}
    for batch in stream[6:9]:
        ours.step(batch)
    ours.load_state(kept)
    plain.load_state(kept)
    for batch in stream[9:]:
        ours.step(batch)
        plain.step(batch)
    assert_alike(ours, plain)


def test_a_replayed_step_that_broke_is_named(taped):
    trainee, rows = make("topk", k=4), batches(8)
    for batch in rows[:4]:
        trainee.step(batch)
    assert trainee.replays.is_recorded
    trainee.step(Batch(torch.full((B, D), torch.nan)))
    with pytest.raises(NonFiniteLoss, match="step 4: ") as caught:
        trainee.state()
    assert caught.value.is_input_finite is False


def test_a_recording_that_hardly_serves_is_made_less_often():
    made = []

    def record(batch: Batch, work: Any) -> Any:
        made.append(1)
        return replay.Recording(lambda: None, (batch.x.clone(),), ("loss",), torch.zeros(1))

    replays = replay.Replays(True, lambda: None)
    batch, work = batches(1)[0], lambda batch: {"loss": batch.x.sum()}
    original, replay.record = replay.record, record
    try:
        for index in range(60):
            replays.take(batch, index // 4, work)
    finally:
        replay.record = original
    assert len(made) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("variant", RECORDED)
def test_a_graph_trains_to_the_same_bits(variant):
    ours, plain = make(variant, "cuda", **settings_of(variant)), make(variant, "cuda", **settings_of(variant))
    plain.replays.is_possible = False
    replayed = 0
    for batch in batches(STEPS - 5, "cuda"):
        told, expected = ours.step(batch).scalars(), plain.step(batch).scalars()
        assert told == expected
        replayed += ours.replays.is_recorded
    assert ours.replays.refused is None and replayed >= 6
    assert_alike(ours, plain)
