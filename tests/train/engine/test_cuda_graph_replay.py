"""Steps that are recorded and replayed, as a GPU does by a CUDA graph. Without one a tape stands in for the graph: it
does the recorded operations again on the same tensors, with the numbers that the host had when it was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from saemill.train.data import device_copies
from saemill.train.data.batch import Batch
from saemill.train.data.device_copies import NotRecordable
from saemill.train.engine import cuda_graph_replay, step
from saemill.train.engine.adam import Optim
from saemill.train.engine.schedules import Constant
from saemill.train.engine.step import Trainee
from saemill.train.engine.terms_and_constraints import Assembly, Term
from saemill.train.errors import NonFiniteLoss
from saemill.train.kit.variant_registry import config_type
from saemill.train.sae import gates
from saemill.train.sae.extra_modules import extras_of
from saemill.train.sae.kernels import hardware
from saemill.train.sae.kernels.sparse_support import Support

from .conftest import top_of_batch
from .test_no_waits import CASES, ON_A_GPU

D, F, B, STEPS = 8, 24, 12, 40
REFUSED = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount")
ROWS = 36  # of two windows
ENTRIES = 2048  # of attention, more than two windows have
LAUNCHED = {  # a knob changes in each step, or the host counts or draws what shapes depend on
    *("p_anneal", "pca", "treesae", "positional scattered", "tiered topk", "tiered resampled"),
    *("temporal", "temporal topk", "temporal batchtopk", "temporal apart", "temporal pruned"),
}
ON_A_CARD = ("topk", "batchtopk", "abstopk", "jumprelu", "gated", "ortsae", "clt", "tsae")
ON_A_CARD += ("hierarchical topk", "attention encoder", "positional ranges", "tiered")


class Tape(TorchDispatchMode):
    """Every operation, with what it was given and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(REFUSED):
            raise RuntimeError(f"{func}: not permitted while it is recorded")
        if str(func).startswith("aten.lift_fresh"):
            raise NotRecordable("numbers of the host would go to the GPU")
        result = func(*args, **(kwargs or {}))
        if str(func).startswith("aten.empty"):  # memory that a graph keeps; here it is also read while recorded
            return result.zero_()
        if (kwargs or {}).get("generator") is None:  # the host's own work is in no graph
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


class TapedMemory:
    """Records on a tape; the trainee's state stays what it was, as a graph leaves it."""

    is_on = False
    is_used_up = False
    dropped = 0

    def require_room(self) -> None:
        pass

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        owner = next(cell.cell_contents for cell in _cells(work) if isinstance(cell.cell_contents, Trainee))
        kept = [*owner._own_state().values(), owner._frozen, owner.optimiser._rates]
        before, tape, TapedMemory.is_on = [tensor.clone() for tensor in kept], Tape(), True
        try:
            with tape:
                told = work()
        finally:
            TapedMemory.is_on = False
            with torch.no_grad():
                for tensor, value in zip(kept, before, strict=True):
                    if not torch.equal(tensor, value) and tensor.dtype != torch.uint8:  # the generator is the host's
                        tensor.copy_(value)
        return lambda: told.copy_(tape.play()[id(told)]), told


@pytest.fixture
def taped(monkeypatch):
    """Steps of CPU tensors are looked at late and recorded on a tape."""
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    monkeypatch.setattr(cuda_graph_replay, "memory_of", lambda device: TapedMemory())
    monkeypatch.setattr(device_copies, "is_recording", lambda: TapedMemory.is_on)
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


def make(variant: str, device: str = "cpu", is_replayed: bool = True, **settings: Any) -> Trainee:
    config = config_type(variant)(width=F, optim=Optim(start="drawn", warmup_max_fraction=0.5), **settings)
    return trainee_of(variant, config.build(D), device, is_replayed)


def trainee_of(name: str, assembly: Assembly, device: str, is_replayed: bool) -> Trainee:
    trainee = Trainee(name, assembly, total_steps=STEPS, device=device)
    trainee.replays.is_possible = is_replayed and all(extra.is_recordable for extra in extras_of(trainee.sae))
    return trainee


def make_pair(variant: str, **settings: Any) -> tuple[Trainee, Trainee]:
    """One whose steps are replayed, and one whose are launched."""
    return make(variant, **settings), make(variant, is_replayed=False, **settings)


def batches(count: int, device: str = "cpu") -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(B, D, generator=rng).to(device)) for _ in range(count)]


def assert_alike(ours: Trainee, plain: Trainee) -> None:
    for name, tensor in plain.state().items():
        assert torch.equal(tensor, ours.state()[name]), name


def settings_of(variant: str) -> dict[str, Any]:
    known = config_type(variant).__dataclass_fields__
    return {name: value for name, value in {"k": 4, "target_l0": 4.0}.items() if name in known}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_train_to_the_same_bits(taped, battery, case):
    """Through the learning rate's rise and fall, with a row more or less, and with latents that die and are listed
    anew."""
    replayed = train_alike(*pair_of(battery, case), batches_for(battery, case))
    assert (replayed >= 32) == (case not in LAUNCHED)


def pair_of(battery: Any, case: str, device: str = "cpu") -> tuple[Trainee, Trainee]:
    config = battery.quick(case.split()[0], width=F, k=4, target_l0=4.0, dead_after_tokens=3 * ROWS, **ON_A_GPU[case])
    config = replace(config, optim=replace(config.optim, warmup_steps=STEPS, warmup_max_fraction=0.5))
    ours, plain = (trainee_of(case, config.build(battery.D), device, is_replayed) for is_replayed in (True, False))
    return ours, plain


def batches_for(battery: Any, case: str, device: str = "cpu") -> list[Batch]:
    """Batches with side inputs, with as many entries of attention in each."""
    config = battery.quick(case.split()[0], **ON_A_GPU[case])
    drawn = (battery.batches(config, 1, ROWS - index % 2, seed=index)[0] for index in range(STEPS))
    return [Batch(b.x, b.target, padded(b.side)).map(lambda tensor: tensor.to(device)) for b in drawn]


def padded(side: Mapping[str, Any]) -> dict[str, Any]:
    attention = {layer: rows.padded(ENTRIES) for layer, rows in side.get("attention", {}).items()}
    return {**side, "attention": attention} if attention else dict(side)


def train_alike(ours: Trainee, plain: Trainee, stream: list[Batch]) -> int:
    """How many of our steps were replayed."""
    replayed = 0
    for batch in stream:
        before = ours.replays.served
        assert ours.step(batch).scalars() == plain.step(batch).scalars()
        replayed += ours.replays.served > before
    assert_alike(ours, plain)
    return replayed


@pytest.mark.parametrize(("every_steps", "replayed"), [(1, 12), (3, 10)])
def test_what_the_host_draws_is_drawn_again_for_each_replay(taped, every_steps, replayed):
    ours, plain = make_pair("ortsae", k=4, every_steps=every_steps)
    assert train_alike(ours, plain, batches(15)) == replayed


def test_a_step_that_draws_in_another_way_is_not_recorded(taped):
    """It would be drawn once: such steps go on as they were."""
    ours, plain = make_pair("topk", k=4)
    for trainee in (ours, plain):
        term = trainee.assembly.terms[0]
        drawing = lambda view, term=term: term.fn(view) * torch.rand((), generator=view.generator)  # noqa: E731
        trainee.assembly = trainee.assembly.replacing(replace(term, fn=drawing))
    assert train_alike(ours, plain, batches(15)) == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_recording_that_could_not_begin_changes_nothing(taped, monkeypatch, error):
    """Not what is drawn either; and it is said once that steps are slower."""

    def memory_of(device: torch.device) -> Any:
        raise error("no room")

    monkeypatch.setattr(cuda_graph_replay, "memory_of", memory_of)
    ours, plain = make_pair("ortsae", k=4, every_steps=1)
    with pytest.warns(UserWarning, match="ortsae: its steps are not recorded, which is slower: no room"):
        assert train_alike(ours, plain, batches(6)) == 0


def test_batches_of_two_sizes_are_both_recorded(taped):
    """Where massive rows are left out, a batch has one row more or less. The first step only finds that its terms read
    the list of dead latents."""
    ours, plain = make_pair("topk", k=4)
    stream = [Batch(batch.x[: B - index % 2]) for index, batch in enumerate(batches(16))]
    assert train_alike(ours, plain, stream) == 11


def test_another_number_of_dead_latents_is_not_read_where_the_old_one_lay(taped):
    """It comes back to what it was, in another place."""
    ours, plain = make_pair("topk", k=4, dead_after_tokens=10**6)
    for batch, dead in zip(batches(34), [3] * 8 + [5] * 8 + [3] * 18, strict=True):
        for trainee in (ours, plain):
            trainee.counters.tokens_since_fired[:] = 0
            trainee.counters.tokens_since_fired[-dead:] = 10**7
        assert ours.step(batch).scalars() == plain.step(batch).scalars()
    assert_alike(ours, plain)


@pytest.mark.parametrize(("variant", "least"), [("topk", 70), ("jumprelu", 86)])
def test_steps_are_replayed_however_often_latents_die(taped, monkeypatch, variant, least):
    """Of 96, with batches of two sizes and another list at each look: it is recorded anew only where it is read."""
    monkeypatch.setattr(step, "LOOK_EVERY", 16)
    ours, plain = make_pair(variant, **settings_of(variant) | {"dead_after_tokens": 10**6})
    stream = [Batch(batch.x[: B - index % 2]) for index, batch in enumerate(batches(96))]
    replayed = 0
    for index in range(0, 96, 16):
        for trainee in (ours, plain):
            trainee.counters.tokens_since_fired[:] = 0
            trainee.counters.tokens_since_fired[-2 - index // 16 :] = 10**7
        replayed += train_alike(ours, plain, stream[index : index + 16])
    assert replayed >= least


class EndlessGraph:
    """A recording that CUDA has given up by the time it is to end."""

    def capture_begin(self, **words: Any) -> None: ...

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_recording_that_cannot_be_ended_is_cleaned_up(monkeypatch):
    """Or the allocator goes on as if it were recorded, and so do the device's random numbers."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EndlessGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    memory, ended = cuda_graph_replay.Memory.__new__(cuda_graph_replay.Memory), []
    memory._device, memory._stream, memory._pool = torch.device("cpu"), stream, (0, 1)
    monkeypatch.setattr(memory, "_end", ended.append)
    with pytest.raises(RuntimeError, match="previous error"):
        memory.record(lambda: torch.zeros(1))
    assert [type(graph) for graph in ended] == [EndlessGraph]


class FullMemory:
    def __init__(self, device: torch.device) -> None:
        self.is_used_up = False


def test_memory_for_recordings_is_renewed(monkeypatch):
    monkeypatch.setattr(cuda_graph_replay, "Memory", FullMemory)
    device = torch.device("cpu")
    first = cuda_graph_replay.memory_of(device)
    assert cuda_graph_replay.memory_of(device) is first
    first.is_used_up = True
    second = cuda_graph_replay.memory_of(device)
    assert second is not first and cuda_graph_replay.memory_of(device) is second


def test_weights_that_were_written_to_from_outside_are_not_replayed_over(taped):
    ours, plain = make_pair("topk", k=4)
    stream = batches(14)
    train_alike(ours, plain, stream[:6])
    for trainee in (ours, plain):
        trainee.sae.W_enc.data = trainee.sae.W_enc.data * 1.5
    assert train_alike(ours, plain, stream[6:]) == 6


def test_a_loaded_state_is_trained_on(taped):
    ours, plain = make_pair("topk", k=4)
    stream = batches(12)
    for batch in stream[:6]:
        ours.step(batch)
    kept = {name: tensor.clone() for name, tensor in ours.state().items()}
    for batch in stream[6:9]:
        ours.step(batch)
    ours.load_state(kept)
    plain.load_state(kept)
    assert train_alike(ours, plain, stream[9:]) == 1


def test_a_replayed_step_that_broke_is_named(taped):
    trainee, rows = make("topk", k=4), batches(8)
    for batch in rows[:4]:
        trainee.step(batch)
    assert trainee.replays.served
    trainee.step(Batch(torch.full((B, D), torch.nan)))
    with pytest.raises(NonFiniteLoss, match="step 4: ") as caught:
        trainee.state()
    assert caught.value.is_input_finite is False


def test_a_recording_that_hardly_serves_is_made_less_often(monkeypatch):
    made = []

    def record(*given: Any) -> Any:
        made.append(1)
        return record_nothing(*given)

    monkeypatch.setattr(cuda_graph_replay, "record", record)
    monkeypatch.setattr(cuda_graph_replay, "memory_of", lambda device: TapedMemory())
    replays = cuda_graph_replay.Replays("topk", True, torch.Generator(), lambda: None)
    batch, work = batches(1)[0], lambda batch: {"loss": batch.x.sum()}
    for index in range(4 * cuda_graph_replay.KEPT + 20):
        replays.take(batch, index // 4, work)
    assert len(made) == cuda_graph_replay.KEPT
    replays.end()
    assert replays.take(batch, 0, work)["loss"] == batch.x.sum()
    assert len(made) == cuda_graph_replay.KEPT


def test_batches_of_whole_windows_are_mostly_replayed(monkeypatch):
    """Their numbers of rows differ: here by a standard deviation of four."""
    monkeypatch.setattr(cuda_graph_replay, "record", record_nothing)
    monkeypatch.setattr(cuda_graph_replay, "memory_of", lambda device: TapedMemory())
    generator = torch.Generator().manual_seed(0)
    replays = cuda_graph_replay.Replays("topk", True, generator, lambda: None)
    for size in (100 + 4 * torch.randn(1000, generator=generator)).round().int().tolist():
        replays.take(Batch(torch.zeros(size, 1)), (), lambda batch: {"loss": batch.x.sum()})
    assert replays.served > 900


def record_nothing(batch: Batch, work: Any, memory: Any, drawn: Any) -> Any:
    return cuda_graph_replay.Recording(lambda: None, batch.tensors(), drawn, ("loss",), torch.zeros(1))


def test_recordings_for_other_sizes_share_the_memory_of_their_inputs(taped):
    ours, plain = make_pair("topk", k=4)
    train_alike(ours, plain, [Batch(batch.x[: B - index // 8]) for index, batch in enumerate(batches(16))])
    recordings = [kind.recording for kind in ours.replays._kinds.values() if kind.recording is not None]
    assert len({len(recording.inputs[0]) for recording in recordings}) == 2
    assert len({recording.inputs[0].data_ptr() for recording in recordings}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_CARD)
def test_a_graph_trains_to_the_same_bits(battery, case):
    assert train_alike(*pair_of(battery, case, "cuda"), batches_for(battery, case, "cuda")) >= 32


@pytest.mark.gpu
def test_recordings_that_move_other_tables_take_turns():
    """Each second step leaves the encoder where it is: a table's steps are counted where it is moved."""
    ours, plain = make_pair("topk", "cuda", k=4)
    for trainee in (ours, plain):
        whole = trainee.assembly.terms[0]
        decoder = Term("decoder", lambda view: view.sae.W_dec.square().sum(), Constant(0.1))
        now_and_then = replace(whole, weight=lambda step, total: float(step % 2))
        trainee.assembly = replace(trainee.assembly, terms=(now_and_then, decoder))
    assert train_alike(ours, plain, batches(16, "cuda")) == 12


@pytest.mark.gpu
def test_a_step_that_a_gpu_cannot_record_leaves_it_whole():
    """A number is read on the host in the middle of it: CUDA breaks the recording off. Recordings that were made stay,
    and others are made."""
    torch.cuda.init()
    held, ours, other = (make("topk", "cuda", k=4) for _ in range(3))
    for batch in batches(5, "cuda"):
        held.step(batch)
    term = ours.assembly.terms[0]
    reads = replace(term, fn=lambda view: term.fn(view) * float(view.x.sum() > -torch.inf))
    ours.assembly = ours.assembly.replacing(reads)
    with pytest.warns(UserWarning, match="steps are not recorded"):
        for batch in batches(5, "cuda"):
            ours.step(batch)
    torch.cuda.empty_cache()
    assert torch.randn(3, device="cuda").isfinite().all()
    for batch in batches(5, "cuda"):
        held.step(batch)
        other.step(batch)
    assert (held.replays.served, other.replays.served) == (7, 2)
