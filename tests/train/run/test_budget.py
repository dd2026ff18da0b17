"""Steps from tokens, epochs, or neither."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saemill.cache_schema import Store
from saemill.train.config.run_config import CourseConfig, RunRequest
from saemill.train.data.shuffle_order import Plan, SplitSizes
from saemill.train.errors import ConfigInvalid, NothingToTrain
from saemill.train.run.fill_config_from_store import settle, settle_budget
from saemill.train.run.preflight import _require_held_out


def plan(windows=100, tokens=10, batch=50, pool=400):
    sizes = SplitSizes(0, 16, 20, 5, np.full(windows, tokens), 0.0, 0.0)
    return Plan(sizes, batch_tokens=batch, pool_tokens=pool, seed=0)


@pytest.mark.parametrize(
    "tokens, epochs, steps",
    [
        (1000, None, 20),
        (500, None, 10),
        (549, None, 10),
        (None, 3, 60),
        (1500, 3, 30),
        (3000, 3, 60),
        (500, 10**20, 10),
    ],
)
def test_steps(tokens, epochs, steps):
    assert settle_budget(CourseConfig(tokens=tokens, epochs=epochs), plan(), "s")[0] == steps


@pytest.mark.parametrize(("millions", "epochs"), [(0.25, 16), (0.5, 16), (1, 8), (3, 3), (8, 1), (9, 1)])
def test_without_a_length_a_store_is_read_whole_until_it_is_eight_million_tokens(millions, epochs):
    sizes = plan(tokens=int(10_000 * millions), batch=5000, pool=100_000)
    assert settle_budget(CourseConfig(), sizes, "s")[0] == epochs * millions * 200


def test_small_stores_are_read_again_and_it_is_said():
    steps, remark = settle_budget(CourseConfig(), plan(), "s")
    assert steps == 16 * 1000 // 50
    assert "no --tokens or --epochs given: 16,000 tokens, 16 epochs of 1,000" in remark


@pytest.mark.parametrize(
    ("asked", "steps", "every"),
    [
        ({"course.epochs": 40}, 4000, 50),
        ({"course.epochs": 3}, 300, 6),
        ({"course.tokens": 640}, 10, 1),
        ({"course.epochs": 3, "course.metrics_every_steps": 50}, 300, 50),
    ],
)
def test_a_short_run_has_curves_and_what_is_asked_for_stays(big, asked, steps, every):
    """44 steps had two points, which no picture shows as a curve."""
    asked = {"layer": 3, "data.batch_tokens": 64, "data.pool_tokens": 512, **asked}
    with Store.open(big["path"]) as store:
        settled = settle(RunRequest.of_variants(["topk"], asked), store)
    assert (settled.total_steps, settled.config.course.metrics_every_steps) == (steps, every)


def test_too_short_a_store_names_the_remedy():
    with pytest.raises(ConfigInvalid, match="at most 100,000 --epochs without --tokens, found 100,000,000"):
        settle_budget(CourseConfig(epochs=10**20), plan(), "s")
    with pytest.raises(ConfigInvalid, match=r"2,500 tokens, .* 1,000 in an epoch: give --epochs 3"):
        settle_budget(CourseConfig(tokens=2500), plan(), "s")


@pytest.mark.parametrize(
    "case, said",
    [
        (plan(tokens=0), "0 tokens to train on"),
        (
            plan(batch=400, windows=30),
            "300 tokens, less than one batch of 400: nothing to train. Set a smaller data.batch",
        ),
        (plan(batch=400), "1,000 tokens, cut into pools that each hold less than a batch of 400: .*, or a larger data"),
    ],
)
def test_nothing_to_train(case, said):
    with pytest.raises(NothingToTrain, match=said):
        settle_budget(CourseConfig(), case, "s")
    with pytest.raises(NothingToTrain, match="less than one batch"):
        settle_budget(CourseConfig(tokens=3), plan(), "s")
    store: Any = SimpleNamespace(url="s", manifest=SimpleNamespace(splits={"validation": (3, 3)}))
    with pytest.raises(NothingToTrain, match="or import it with --validation above 0"):
        _require_held_out(store, store)


def test_every_step_of_a_run_is_a_number_above_zero():
    with pytest.raises(ConfigInvalid, match="tokens: expected 1 or more, found -5"):
        CourseConfig(tokens=-5)
    with pytest.raises(ConfigInvalid, match="checkpoint_every_seconds: expected 0 or more, found nan"):
        CourseConfig(checkpoint_every_seconds=float("nan"))
