"""Fill in whatever a request leaves open, including the number of steps, from the store.

The result determines the run and becomes its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...cache_schema import Manifest, Store
from ...cache_schema.massive_activations import default_multiple
from ...cache_schema.sites import by_hook
from ...cache_schema.strict_json import StrictError, from_json, to_json
from ..config.recipe import Recipe
from ..config.run_config import CourseConfig, DataConfig, RunConfig, RunRequest, damaged, read_run_config
from ..config.sanity_baselines import with_baselines
from ..data.shuffle_order import Plan, measure_split
from ..errors import ConfigInvalid, NothingToTrain
from ..kit.variant_contract import Variant
from .init_from_trained_sae import Source, source_of, without_start
from .run_folder import RunFolder, provenance

DEFAULT_TOKENS = 8_000_000  # without --epochs, a smaller store is read several times
MOST_EPOCHS = 16
MOST_ASKED = 100_000  # epochs, whose steps are counted one epoch at a time
CURVE_POINTS = 50  # on the curves of a short run
FORMAT = 1  # of config.json
POOL_BYTES = 2 * 2**30  # of two-byte residuals, per layer and pool; there are two pools


@dataclass(frozen=True)
class Settled:
    """A fully specified run: its configuration, the order in which it reads the store, its length."""

    config: RunConfig
    plan: Plan
    total_steps: int
    remark: str = ""
    """How the length was chosen."""
    unread: tuple[str, ...] = ()
    """In words: settings given to all SAEs that some do not read."""
    recipe: Recipe | None = None
    init: Source | None = None
    """The trained SAE that all start from."""
    samples_whole_shards: bool = False
    """Whether massive rows are measured on whole shards, however few, as in runs of earlier versions."""

    def describe(self, store: Store, hardware: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "format": FORMAT,
            "recipe": self.recipe and f"{self.recipe.study}/{self.recipe.name}",
            "cache": {
                "url": store.url,
                "cache_id": store.manifest.cache_id,
                "shard_windows": store.manifest.shard_windows,
                "model": store.manifest.model.id,
                "model_revision": store.manifest.model.revision,
                "corpus": store.manifest.corpus.id,
            },
            **({} if self.init is None else {"init": to_json(self.init)}),
            **self.config.to_json(),
            "massive_sample": "parts",
            "total_steps": self.total_steps,
            "provenance": provenance(hardware),
        }


def settle(request: RunRequest, store: Store) -> Settled:
    """Settle a new run."""
    manifest = store.manifest
    data = with_pool(request.data(DataConfig(massive_norms=default_multiple(manifest))), manifest)
    plan = make_plan(data, store)
    steps, remark = settle_budget(request.course(CourseConfig()), plan, store.url)
    tokens = steps * plan.batch_tokens
    every = max(1, min(CourseConfig.metrics_every_steps, steps // CURVE_POINTS))
    course = replace(request.course(CourseConfig(metrics_every_steps=every)), tokens=tokens)

    def limits(config: Variant) -> Mapping[str, float]:
        return config.limits(manifest, tokens)

    members = request.members(limits, by_hook(manifest.sites))
    unread = request.say_unread(members)
    members = with_baselines(members, limits, request.recipe) if request.baselines else members
    members = tuple(replace(member, config=member.config.fill(manifest)) for member in members)
    init = None if request.init is None else source_of(Path(request.init))
    if init is not None:
        if starts := [key for keys in (request.settings, *request.grid) for key in keys if key.endswith("optim.start")]:
            raise ConfigInvalid(
                f"{starts[0]}: SAEs that start from --init take no other start: leave out one of the two"
            )
        members = tuple(map(without_start, members))
    config = RunConfig(data, course, members)
    return Settled(config, plan, steps, remark, unread, request.recipe, init)


def settle_again(folder: RunFolder, store: Store) -> Settled:
    """Settle an existing run from its config.json."""
    raw, where = folder.read_config(), str(folder.path / "config.json")
    if (found := raw.get("format", FORMAT)) != FORMAT:
        raise ConfigInvalid(f"{where} has format {found!r}; this saemill reads format {FORMAT}. Update saemill")
    config = read_run_config(raw, where)
    if not isinstance(steps := raw.get("total_steps"), int) or steps < 1:
        raise damaged(where, f"total_steps: expected 1 or more, found {steps!r}")
    if config.data.pool_tokens is None:
        raise damaged(where, "data.pool_tokens: expected a whole number, found None")
    try:
        init = from_json(Source, raw["init"], "init") if "init" in raw else None
    except StrictError as error:
        raise damaged(where, error) from None
    begun_with, found = raw["cache"].get("shard_windows"), store.manifest.shard_windows
    if begun_with not in (None, found):
        raise ConfigInvalid(
            f"{where}: expected a store with {begun_with} windows per shard, found {found} in {store.url}: the same "
            f"text would be read in a different order. Harvest it with --shard-windows {begun_with}, or start a new run"
        )
    plan, is_older = make_plan(config.data, store), "massive_sample" not in raw
    return Settled(config, plan, steps, init=init, samples_whole_shards=is_older)


def make_plan(data: DataConfig, store: Store) -> Plan:
    assert data.pool_tokens is not None
    sizes = measure_split(store, "train")
    return Plan(sizes, batch_tokens=data.batch_tokens, pool_tokens=data.pool_tokens, seed=data.seed)


def with_pool(data: DataConfig, manifest: Manifest) -> DataConfig:
    """Fill in the size of the pool. It depends only on the store, so a fleet draws what each SAE would draw alone."""
    if data.pool_tokens is not None:
        return data
    return replace(data, pool_tokens=max(data.batch_tokens, POOL_BYTES // (2 * manifest.model.d_model)))


def settle_budget(course: CourseConfig, plan: Plan, where: str) -> tuple[int, str]:
    """Steps from tokens, epochs or neither, and a remark on how; an error if the store has too little text."""
    available = plan.steps_in(1)
    _require_steps(available, plan, where)
    if course.tokens is None:
        if (course.epochs or 1) > MOST_ASKED:
            raise ConfigInvalid(
                f"expected at most {MOST_ASKED:,} --epochs without --tokens, found {course.epochs:,}: give --tokens too"
            )
        epochs = course.epochs or max(1, min(MOST_EPOCHS, -(-DEFAULT_TOKENS // (available * plan.batch_tokens))))
        reason = "" if course.epochs else "no --tokens or --epochs given: "
        return _with_remark(plan.steps_in(epochs), plan, reason)
    epochs = course.epochs or 1
    steps = course.tokens // plan.batch_tokens
    if steps == 0:
        raise NothingToTrain(
            f"a budget of {course.tokens:,} tokens is less than one batch of {plan.batch_tokens:,}: nothing to "
            "train. Give more --tokens, or a smaller data.batch_tokens"
        )
    if course.tokens > plan.sizes.tokens * epochs:
        needed = -(-course.tokens // (available * plan.batch_tokens))
        raise ConfigInvalid(
            f"a budget of {course.tokens:,} tokens, but the train split of {where} has only {plan.sizes.tokens:,} "
            f"in an epoch{f', {plan.sizes.tokens * epochs:,} in {epochs}' if epochs > 1 else ''}: "
            f"give --epochs {needed} to read it again, or fewer --tokens"
        )
    return _with_remark(min(steps, plan.steps_in(epochs, enough=steps)), plan, "")


def _with_remark(steps: int, plan: Plan, reason: str) -> tuple[int, str]:
    tokens = steps * plan.batch_tokens
    return steps, f"{reason}{tokens:,} tokens, {tokens / plan.sizes.tokens:.2g} epochs of {plan.sizes.tokens:,}"


def _require_steps(available: int, plan: Plan, where: str) -> None:
    sizes = plan.sizes
    if sizes.windows == 0 or sizes.tokens == 0:
        raise NothingToTrain(
            f"the train split of {where} has {sizes.windows:,} windows with {sizes.tokens:,} tokens to train on: "
            "nothing to train. Harvest more text, or inspect its splits with `sae-store info`"
        )
    if available == 0:
        found, instead = "less than one batch", ""
        if sizes.tokens >= plan.batch_tokens:
            found, instead = "cut into pools that each hold less than a batch", ", or a larger data.pool_tokens"
        raise NothingToTrain(
            f"the train split of {where} has {sizes.tokens:,} tokens, {found} of {plan.batch_tokens:,}: nothing to "
            f"train. Set a smaller data.batch_tokens{instead}"
        )
