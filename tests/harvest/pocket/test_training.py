"""The parts of the training: batches, learning rate, checkpoint and resume."""

from collections import Counter
from pathlib import Path

import numpy as np
import pocket_model
import pytest
import torch
import trainer as trainer_module
from hypothesis import given, settings
from hypothesis import strategies as st
from pocket_model import load_checkpoint, save_checkpoint
from trainer import (
    CYCLE,
    DECAY_FROM,
    WARMUP_STEPS,
    Batches,
    Corpus,
    Trainer,
    context_of,
    learning_rate,
)

BOS = 2


def make_batches(tokens: int = 9000, tokens_per_step: int = 1024) -> Batches:
    return Batches(np.arange(3, 3 + tokens), BOS, tokens_per_step, seed=1)


@pytest.mark.parametrize("context", sorted(set(CYCLE)))
def test_a_pass_visits_every_piece_once(context: int) -> None:
    batches = make_batches()
    steps = [step for step in range(40 * len(CYCLE)) if context_of(step) == context]
    per_pass = (9000 // context - 1) // (1024 // context)
    seen = Counter(t for step in steps[:per_pass] for t in batches.batch(step)[1].ravel().tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == per_pass * 1024


@given(step=st.integers(0, 10_000), tokens=st.integers(3000, 20_000))
@settings(deadline=None)
def test_a_window_is_bos_and_the_piece_before_its_targets(step: int, tokens: int) -> None:
    inputs_BT, targets_BT = make_batches(tokens).batch(step)
    assert inputs_BT.shape == targets_BT.shape == (1024 // context_of(step), context_of(step))
    assert (inputs_BT[:, 0] == BOS).all()
    assert (inputs_BT[:, 1:] == targets_BT[:, :-1]).all()
    assert (np.diff(targets_BT, axis=1) == 1).all()  # pieces are consecutive tokens of the run
    assert targets_BT.min() >= 3
    assert targets_BT.max() < 3 + tokens


def test_a_batch_depends_on_the_step_alone() -> None:
    forward = [make_batches().batch(step)[1] for step in range(20)]
    backward = [make_batches().batch(step)[1] for step in reversed(range(20))]
    assert all((a == b).all() for a, b in zip(forward, reversed(backward), strict=True))


def test_passes_differ() -> None:
    batches = make_batches()
    first, second = (batches.batch(step)[1] for step in (0, 16))  # one pass of 128 has 8 steps, a cycle 14
    assert not np.array_equal(first, second)


def test_learning_rate_rises_stays_and_ends_at_nothing() -> None:
    assert learning_rate(0, 0.0) == pytest.approx(1 / WARMUP_STEPS)
    assert learning_rate(10_000, DECAY_FROM) == 1
    assert learning_rate(10_000, (1 + DECAY_FROM) / 2) == pytest.approx(0.5)
    assert learning_rate(10_000, 1.0) == learning_rate(10_000, 1.5) == 0


def test_checkpoint_round_trip_and_absence(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    tensors = {"a/b": torch.arange(6.0).view(2, 3).t(), "c": torch.ones((), dtype=torch.bfloat16)}
    record = {"step": 3, "curve": [{"loss": 1.5}]}
    save_checkpoint(tmp_path / "new", tensors, record)
    found = load_checkpoint(tmp_path / "new")
    assert found is not None
    assert found[1] == record
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.safetensors"]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(trainer_module, "TOKENS_PER_STEP", 256)
    monkeypatch.setattr(pocket_model, "LAYERS", 3)
    tokens = np.random.default_rng(0).integers(3, 4096, 9000)
    return Corpus("digest", tokens, tokens[:2048])


@pytest.mark.slow
def test_two_steps_and_two_more_are_four(tmp_path: Path, corpus: Corpus) -> None:
    straight = Trainer(corpus, seed=3, is_compiled=False)
    losses = [straight.advance(step, 0.5) for step in range(4)]
    first = Trainer(corpus, seed=3, is_compiled=False)
    for step in range(2):
        first.advance(step, 0.5)
    save_checkpoint(tmp_path, first.optimizer.state(), {})
    found = load_checkpoint(tmp_path)
    assert found is not None
    second = Trainer(corpus, seed=3, is_compiled=False)
    second.optimizer.load_state(found[0])
    assert [second.advance(step, 0.5) for step in (2, 3)] == losses[2:]
    assert all(
        torch.equal(tensor, second.optimizer.state()[name]) for name, tensor in straight.optimizer.state().items()
    )


def test_a_step_moves_every_weight(corpus: Corpus) -> None:
    trainer = Trainer(corpus, seed=3, is_compiled=False)
    before = {name: tensor.clone() for name, tensor in trainer.optimizer.masters.items()}
    trainer.advance(0, 1.0)
    assert [name for name, old in before.items() if torch.equal(old, trainer.optimizer.masters[name])] == []
    rounded = dict(trainer.model.named_parameters())
    assert all(torch.equal(rounded[name], new.bfloat16()) for name, new in trainer.optimizer.masters.items())
