"""The clean pass and the ablations: computed once for a store, read afterwards, never another store's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saemill.evaluate.evals.core import clean_and_spliced_losses
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.evals.core.choose_rows import Block
from saemill.evaluate.evals.core.clean_and_spliced_losses import Baselines, files_of, from_other_windows, mean_residual
from saemill.evaluate.model.batches import store_batches
from saemill.evaluate.model.prefix_suffix import LanguageModel
from saemill.harvest.model import fused_on_gpu

SMALL = core.Config(batch_size_prompts=4, n_eval_reconstruction_batches=2, resamples=10)


@pytest.fixture
def fresh(make_world):
    """A store with nothing beside it."""
    return make_world(fresh=True)


@pytest.fixture
def passes(monkeypatch):
    """How many windows went through the suffix."""
    counted = []
    original = LanguageModel.suffix

    def watched(self, resid, layer, valid=None):
        counted.append(len(resid))
        return original(self, resid, layer, valid)

    monkeypatch.setattr(LanguageModel, "suffix", watched)
    return counted


def run(context, subject):
    (result,) = core.evaluate(context, [subject], SMALL)
    return result


def kept(world):
    return sorted(Path(f"{world.store}.evals").rglob("*.safetensors"))


def test_a_second_run_computes_its_own_part_alone(fresh, open_context, builder, passes):
    subject = builder.subject(builder.make_sae())
    context = open_context(fresh)
    first = run(context, subject)
    assert sum(passes) == 2 * (4 + 4 + 4 + 1 + 4)  # clean, mean, resample, one window of zeros, spliced
    assert [context.manifest.cache_id in path.parts for path in kept(fresh)] == [True] * 2
    passes.clear()
    second = run(open_context(fresh), subject)
    assert passes == [4, 4]
    assert second.metrics == first.metrics
    assert second.extra == first.extra


def test_a_first_run_asks_for_the_clean_logits_once(fresh, open_context, builder, monkeypatch):
    rows = []
    original = LanguageModel.head

    def watched(self, hidden):
        rows.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(LanguageModel, "head", watched)
    context = open_context(fresh)
    run(context, builder.subject(builder.make_sae()))
    batches = list(store_batches(context.store, "test", batch_windows=4, count=8))
    tokens = sum(int(batch.keep.sum()) for batch in batches)
    assert sum(rows) == 4 * tokens + 2  # clean, mean, resample, spliced; one row of zeros for each batch


@dataclass(frozen=True)
class Asked:
    """All that decides a clean pass and its ablations."""

    context: SimpleNamespace
    block: Block
    layer: int = 2
    ablations: tuple[str, ...] = ("zero", "mean")

    @property
    def place(self) -> str | None:
        files = files_of(self.context, self.layer, self.block, self.ablations)  # type: ignore[arg-type]
        return None if files is None else files.url


def in_scene(**changes: Any) -> Callable[[Asked], Asked]:
    return lambda asked: replace(asked, context=SimpleNamespace(**vars(asked.context) | changes))


def in_block(**changes: Any) -> Callable[[Asked], Asked]:
    return lambda asked: replace(asked, block=replace(asked.block, **changes))


CHANGES: dict[str, Callable[[Asked], Asked]] = {
    "model": in_scene(model_identity="other@1"),
    "revision": in_scene(model_identity="model@2"),
    "store": in_scene(manifest=SimpleNamespace(cache_id="other", layers=(2, 3))),
    "layer": lambda asked: replace(asked, layer=3),
    "a layer that is not stored": lambda asked: replace(asked, layer=1),
    "split": in_block(split="validation"),
    "batch_windows": in_block(batch_windows=8),
    "dtype": in_scene(dtype=torch.float32),
    "ablations": lambda asked: replace(asked, ablations=("zero", "resample")),
    "from_tokens": in_scene(from_tokens=True),
    "device": in_scene(device=torch.device("cuda")),
    "massive rows": in_scene(massive=lambda layer: SimpleNamespace(multiple=10.0, massive=1)),
}


@pytest.fixture
def asked(tmp_path):
    return Asked(
        SimpleNamespace(
            model_identity="model@1",
            manifest=SimpleNamespace(cache_id="this", layers=(2, 3)),
            store=SimpleNamespace(url=str(tmp_path / "store")),
            dtype=torch.bfloat16,
            from_tokens=False,
            device=torch.device("cpu"),
            massive=lambda layer: None,
        ),
        Block("test", 4, 0, 5),
    )


def test_whatever_decides_a_clean_pass_has_a_place_of_its_own(asked, monkeypatch):
    monkeypatch.setattr(fused_on_gpu, "_kernels_work", lambda device, dtype: False)
    places = {"": asked.place} | {name: change(asked).place for name, change in CHANGES.items()}
    monkeypatch.setattr(fused_on_gpu, "_kernels_work", lambda device, dtype: True)
    places["kernels of ours"] = CHANGES["device"](asked).place
    assert len(set(places.values())) == len(places), places


def test_what_decides_nothing_is_kept_in_the_same_place(asked):
    """A block of more batches reads those of the shorter one; not where the block's own mean is in them."""
    assert in_block(batches=9)(asked).place == asked.place
    without = CHANGES["a layer that is not stored"](asked)
    assert len({change(without).place for change in (in_block(), in_block(batches=9), in_block(first=4))}) == 3


def test_places_of_before_are_found(asked):
    """A name that changes leaves gigabytes behind that nothing reads."""
    assert Path(asked.place).name == "clean-1c7c315a9f84b332"


def test_a_change_of_format_leaves_what_is_kept(asked, monkeypatch):
    before = asked.place
    assert clean_and_spliced_losses.FORMAT == 1
    monkeypatch.setattr(clean_and_spliced_losses, "FORMAT", 2)
    assert asked.place != before


def test_batches_of_another_block_are_other_batches(fresh, open_context, builder):
    context = open_context(fresh)
    batches = list(core_batches(context, builder.LAYER))
    for number in (0, 2):  # of as many tokens
        batch = batches[number]
        maker = Baselines(context, builder.LAYER, Block("test", 4, 4 * number, 1), torch.zeros(builder.D))
        clean, _ = maker.measure(batch, 0, [])
        assert torch.equal(clean.hidden, maker.hidden(batch, batch.resid[builder.LAYER]))


@pytest.mark.parametrize("change", [{"dtype_name": "float32"}, {"from_tokens": True}])
def test_what_is_computed_otherwise_is_kept_apart(fresh, open_context, builder, change):
    subject = builder.subject(builder.make_sae())
    run(open_context(fresh), subject)
    run(open_context(fresh, **change), subject)
    assert len(kept(fresh)) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"", lambda data: data[: len(data) // 2]])
def test_a_damaged_file_is_computed_again(fresh, open_context, builder, damage):
    subject = builder.subject(builder.make_sae())
    first = run(open_context(fresh), subject)
    for path in kept(fresh):
        path.write_bytes(damage(path.read_bytes()))
    assert run(open_context(fresh), subject).metrics == first.metrics
    run(open_context(fresh), subject)


def test_a_place_that_cannot_be_written_is_no_obstacle(fresh, open_context, builder, monkeypatch):
    said = []
    Path(f"{fresh.store}.evals").write_text("a file where the folder should be")
    context = open_context(fresh)
    monkeypatch.setattr(context, "say", said.append)
    result = run(context, builder.subject(builder.make_sae()))
    assert result.metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert sum("cannot be cached" in line for line in said) == 1


def test_zero_ablation_of_one_window_is_that_of_all(world, open_context, builder):
    """Against a batch of zeros run whole, in a model whose positions differ after ablation."""
    context = open_context(world)
    batch = next(iter(core_batches(context, builder.LAYER)))
    maker = Baselines(context, builder.LAYER, Block("test", 4, 0, 1), torch.zeros(builder.D))
    one = maker._zero_logits(batch)(0, int(batch.keep.sum()))
    nothing = torch.zeros_like(batch.resid[builder.LAYER])
    whole = context.model.head(context.model.suffix(nothing, builder.LAYER)[batch.keep])
    torch.testing.assert_close(one, whole)


def test_zero_ablation_looks_at_positions_where_they_matter(world, open_context, builder, monkeypatch):
    context = open_context(world)
    batch = next(iter(core_batches(context, builder.LAYER)))
    hidden = torch.randn(1, builder.CONTEXT, builder.D, generator=torch.Generator().manual_seed(0)).to(context.dtype)
    monkeypatch.setattr(context.model, "suffix", lambda resid, layer, valid=None: hidden.expand(len(resid), -1, -1))
    maker = Baselines(context, builder.LAYER, Block("test", 4, 0, 1), torch.zeros(builder.D))
    rows = int(batch.keep.sum())
    whole = context.model.head(hidden.expand(len(batch), -1, -1)[batch.keep])
    assert torch.equal(maker._zero_logits(batch)(3, rows), whole[3:])


def test_elsewhere_is_another_window_at_the_same_position():
    resid = torch.arange(4 * 3 * 2).reshape(4, 3, 2)
    assert torch.equal(from_other_windows(resid), resid[[2, 3, 0, 1]])
    assert torch.equal(from_other_windows(resid[:1]), resid[:1][:, [2, 0, 1]])


def core_batches(context, layer):
    return store_batches(context.store, "test", (layer,), batch_windows=4)


def test_a_layer_that_is_not_stored_has_the_mean_of_the_rows(world, open_context):
    context = open_context(world, from_tokens=True)
    block = Block("test", 4, 4, 2)
    batches = list(store_batches(context.store, "test", batch_windows=4, first=4, count=8))
    rows = torch.cat([context.model.resid(batch.tokens, (1,))[1][batch.keep] for batch in batches])
    torch.testing.assert_close(mean_residual(context, 1, block), rows.double().mean(0))
