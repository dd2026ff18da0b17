"""What a run was asked to do, as frozen records; and how words on a command line become them.

A run is one stream (`DataConfig`), one course (`CourseConfig`) and one or more SAEs (`Member`). Settings
are written `data.pool_tokens`, `course.tokens`, or by a variant's own names (`k`, `optim.lr`); a name with
a variant in front (`topk.k`) is for the SAEs of that variant alone.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...cache_schema.sites import RESID
from ...cache_schema.strict_json import StrictError, flatten, from_json, nearest, to_json
from ..data.batch import Needs
from ..errors import ConfigInvalid, name_sae
from ..kit import variant_registry
from ..kit.check_variant_settings import require, require_bounds, require_least
from ..kit.variant_contract import Variant
from .parse_settings import split_key, with_settings
from .recipe import Recipe, Sae

LONGEST_LABEL = 180  # checkpoints read 200 characters back, and baselines add some to a name
Limits = Callable[[Variant], Mapping[str, Any]]
"""What bounds the defaults of a config."""
Held = Mapping[str, Sequence[int]]
"""Hook to the layers of it that a store holds."""


@dataclass(frozen=True)
class DataConfig:
    """The stream that all SAEs of a run share."""

    seed: int = 0
    """Of the read order alone: SAEs have seeds of their own, so a fleet over seeds reads one stream."""
    batch_tokens: int = 4096
    pool_tokens: int | None = None
    """Tokens that are shuffled together in memory, in each of two pools; None: as many as take 2 GiB per layer in
    each, where an activation takes two bytes."""

    massive_norms: float | None = None
    """Rows whose norm is beyond this multiple of their layer's median norm are left out of scale, mean, loss and
    numbers; None, on a command line inf: every row counts. New runs take the store's (10, or None where an import
    asked for it); a run of before the setting has none."""

    def __post_init__(self) -> None:
        require_least(self, seed=0, batch_tokens=1, pool_tokens=1)
        require(
            self.massive_norms is None or self.massive_norms > 1,
            f"massive_norms: expected a multiple of the median norm above 1, or inf, found {self.massive_norms}",
        )


@dataclass(frozen=True)
class CourseConfig:
    """How long a run is, and what it does besides training."""

    tokens: int | None = None
    epochs: int | None = None
    metrics_every_steps: int = 50
    checkpoint_every_seconds: float = 300.0
    checkpoint_every_steps: int | None = None
    """If set, the clock is ignored."""
    validation_tokens: int = 131_072
    shard_width: bool = False
    """With several processes: each holds some of every dictionary's latents and reads all rows of every batch, for
    widths that do not fit on one device."""
    trackers: tuple[str, ...] = ()
    """Further logs, through accelerate: wandb, tensorboard and others."""

    def __post_init__(self) -> None:
        require_least(self, tokens=1, epochs=1, metrics_every_steps=1, validation_tokens=1)
        require_least(self, checkpoint_every_seconds=0, checkpoint_every_steps=1)


@dataclass(frozen=True)
class Member:
    """One SAE of a run."""

    label: str
    variant: str
    config: Variant


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    data: DataConfig
    course: CourseConfig
    members: tuple[Member, ...]

    def requests(self) -> dict[str, Needs]:
        return {member.label: member.config.needs() for member in self.members}

    def to_json(self) -> dict[str, Any]:
        saes = {m.label: {"variant": m.variant, "config": to_json(m.config)} for m in self.members}
        return {"data": to_json(self.data), "course": to_json(self.course), "saes": saes}


def read_run_config(raw: Mapping[str, Any], where: str) -> RunConfig:
    """The inverse of `RunConfig.to_json`. A label is the name of a folder, and may lead nowhere else."""
    try:
        saved = from_json(_Saved, {key: raw[key] for key in ("data", "course", "saes") if key in raw})
        outside = [label for label in saved.saes if not re.fullmatch(r"[\w+-][\w.+-]*", label)]
        if outside:
            raise ConfigInvalid(f"{where}: expected labels of SAEs that are names of folders, found {outside[0]!r}")
        members = [
            Member(label, sae.variant, from_json(variant_registry.config_type(sae.variant), sae.config, label))
            for label, sae in saved.saes.items()
        ]
    except StrictError as error:
        raise damaged(where, error) from None
    if not members:
        raise damaged(where, "saes: expected one or more, found none")
    return RunConfig(saved.data, saved.course, tuple(members))


def damaged(where: str, found: object) -> ConfigInvalid:
    """What to raise of a config.json that says less, or other things, than a run's does."""
    return ConfigInvalid(f"{where} is not the configuration of a run: {found}; copy the folder anew")


@dataclass(frozen=True)
class _SavedSae:
    variant: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class _Saved:
    """What a config.json holds of a `RunConfig`."""

    data: DataConfig
    course: CourseConfig
    saes: Mapping[str, _SavedSae]


@dataclass(frozen=True)
class Ask:
    """What was asked for on the command line, before anything is known of the store."""

    saes: tuple[Sae, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[Mapping[str, Any]] = ({},)
    recipe: Recipe | None = None
    baselines: bool = False
    """Whether sanity baselines train beside them."""
    init: str | None = None
    """The folder of a trained SAE that all begin as; None: each begins anew."""

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, settings: Mapping[str, Any] | None = None, grid: Sequence[Mapping[str, Any]] = ({},)
    ) -> Ask:
        """A recipe, changed by what the command line says."""
        return cls(recipe.saes, settings or {}, grid, recipe)

    @classmethod
    def of_variants(
        cls, names: Sequence[str], settings: Mapping[str, Any] | None = None, grid: Sequence[Mapping[str, Any]] = ({},)
    ) -> Ask:
        """Variants at their defaults, each once."""
        for name in names:
            variant_registry.module(name)  # an unknown name is the first error
        return cls(tuple(Sae(name, name) for name in dict.fromkeys(names)), settings or {}, grid)

    def stream(self, defaults: DataConfig) -> DataConfig:
        """The stream that was asked for."""
        asked = self._of("data")
        if asked.get("massive_norms") in ("inf", "Infinity"):  # JSON has neither
            asked["massive_norms"] = None
        return with_settings(defaults, asked, "data")

    def length(self) -> CourseConfig:
        """The course that was asked for."""
        return with_settings(CourseConfig(), self._of("course"), "course")

    def members(self, limits: Limits, held: Held | None = None) -> tuple[Member, ...]:
        """The SAEs. `limits` of a config bound the variant's own defaults, never what was asked for; where nobody
        asked for a layer, it is one of those that the store holds."""
        spread = [key for point in self.grid for key in point]
        misplaced = [key for key in spread if split_key(key)[0] in ("data", "course")]
        if misplaced:
            raise ConfigInvalid(
                f"--grid is of SAEs that share data and course, found {misplaced[0]}: set it by --set, and "
                "start a run for each value"
            )
        for key, said in ((key, said) for key in spread for said in self.settings if self._decides(key, said)):
            raise ConfigInvalid(
                f"expected {key} in --grid alone, found {said}={self.settings[said]} by an option or --set too: "
                "leave out one of the two"
            )
        self._require_known([*self.settings, *spread])
        made = [(sae, point, self._member(sae, point, limits, held or {})) for sae in self.saes for point in self.grid]
        members: dict[str, Member] = {}
        for _, _, member in made:
            if len(member.label) > LONGEST_LABEL:
                raise ConfigInvalid(
                    f"{member.label:.60}...: expected a name of at most {LONGEST_LABEL} characters, which files bear, "
                    f"found {len(member.label)}: fewer settings in --grid, or a recipe with names of its own"
                )
            if members.setdefault(member.label, member) != member:
                raise ConfigInvalid(
                    f"two SAEs of the run would both be called {member.label}: give one of them a run of its own"
                )
        self._require_read(tuple(members.values()), spread)
        self._require_apart(made)
        return tuple(members.values())

    def _decides(self, key: str, said: str) -> bool:
        """Whether a key of the grid leaves a setting without an SAE that would read it."""
        variants = {sae.variant for sae in self.saes}
        own, other = (rest if head in variants else whole for whole in (key, said) for head, rest in [split_key(whole)])
        return own == other and (key in (said, own) or len(variants) == 1)

    def _require_apart(self, made: Sequence[tuple[Sae, Mapping[str, Any], Member]]) -> None:
        """Refuse a setting that takes from two SAEs of a recipe all that sets them apart."""
        for (one, point, first), (other, there, second) in itertools.combinations(made, 2):
            if point != there or first.config != second.config:
                continue
            known = _keys(variant_registry.config_type(one.variant)())
            asked = _own({**self.settings, **point}, one.variant, known)
            over = [key for key in asked if one.settings.get(key) != other.settings.get(key)]
            if over:
                raise ConfigInvalid(
                    f"{first.label} and {second.label} differ in {over[0]} by the recipe, and would be the same "
                    f"SAE twice: leave {over[0]} to the recipe"
                )

    def _require_read(self, members: Sequence[Member], spread: Sequence[str]) -> None:
        """Refuse what is said of SAEs of which none reads it."""
        known = [(member, _keys(member.config)) for member in members]
        for key in dict.fromkeys([*self.settings, *spread]):
            of = [(member, name) for member, keys in known for name in _own({key: None}, member.variant, keys)]
            advice = [member.config.unread().get(name) for member, name in of]
            if not of or None in advice:
                continue
            member, name = of[0]
            found, default = (flatten(to_json(config))[name] for config in (member.config, type(member.config)()))
            if found != default:
                raise ConfigInvalid(
                    f"{member.label}: {name} {self.settings.get(key, found)} would be ignored: {advice[0]}"
                )

    def _member(self, sae: Sae, point: Mapping[str, Any], limits: Limits, held: Held) -> Member:
        config = variant_registry.config_type(sae.variant)()
        known = _keys(config)
        spread = _own(point, sae.variant, known)
        asked = _own(self.settings, sae.variant, known) | spread
        shared = self.recipe.settings if self.recipe else {}
        of_recipe = {key: value for key, value in shared.items() if key in known} | dict(sae.settings)
        draft = with_settings(config, of_recipe | asked, sae.label)
        instead = smaller_defaults(draft, {key: limit for key, limit in limits(draft).items() if key not in asked})
        if held:
            instead |= stored_layer(draft, asked, held)
        config = with_settings(draft, instead, sae.label)
        with name_sae(sae.label):
            require_bounds(config)
        return Member(_label(sae.label, spread), sae.variant, config)

    def _of(self, head: str) -> dict[str, Any]:
        said = {**(self.recipe.settings if self.recipe else {}), **self.settings}
        return {split_key(key)[1]: value for key, value in said.items() if split_key(key)[0] == head}

    def _require_known(self, keys: Iterable[str]) -> None:
        """Refuse a key that no SAE of the run has."""
        names = dict.fromkeys(sae.variant for sae in self.saes)
        by_variant = {name: list(flatten(to_json(variant_registry.config_type(name)()))) for name in names}
        everything = {key for keys in by_variant.values() for key in keys}
        for key in keys:
            head, rest = split_key(key)
            if head in ("data", "course"):
                continue
            if key == "k" and key not in everything:
                said = ("--k", f"--set target_l0={self.settings[key]}") if key in self.settings else ("k", "target_l0")
                instead = f", or ask for {said[1]}" if "target_l0" in everything else ""
                raise ConfigInvalid(
                    f"{', '.join(by_variant)} fixes no number of active latents: leave out {said[0]}{instead}"
                )
            if key not in everything and not (head in by_variant and rest in by_variant[head]):
                shared = {f"data.{k}" for k in to_json(DataConfig())} | {f"course.{k}" for k in to_json(CourseConfig())}
                raise ConfigInvalid(
                    f"unknown setting {key!r} of {', '.join(by_variant)}{nearest(key, everything | shared)}"
                )


def smaller_defaults(config: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The limit for each setting whose default is beyond it."""
    own = {key: getattr(config, key, None) for key in limits}
    return {key: limits[key] for key, value in own.items() if value is not None and value > limits[key]}


def stored_layer(config: Variant, asked: Iterable[str], held: Held) -> dict[str, Any]:
    """The store's only layer in place of a default that it does not hold; where it holds several, the choices."""
    needs = config.needs()
    sides = {"layer": (needs.hook, needs.inputs), "to_layer": (needs.to_hook or needs.hook, needs.targets or ())}
    sides["layers"] = sides["layer"]
    layers, absent = held.get(needs.hook, ()), []
    for key, (hook, wanted) in sides.items():
        if hasattr(config, key) and key not in asked and held.get(hook) and not set(wanted) <= set(held[hook]):
            absent.append(key)
    if not absent or len(layers) == 1:
        return {"layer": layers[0]} if "layer" in absent else {}
    choices = ", and by ".join(_choices(key, held[sides[key][0]]) for key in absent)
    of_hook = "" if needs.hook == RESID else f" of {needs.hook}"
    raise ConfigInvalid(
        f"the store holds layers {', '.join(map(str, layers))}{of_hook} and not the default: choose by {choices}"
    )


def _choices(key: str, layers: Sequence[int]) -> str:
    """What to write on the command line."""
    if key == "layers":
        return f"--set layers={','.join(map(str, layers))}"
    option = "--layer " if key == "layer" else f"--set {key}="
    return " or ".join(f"{option}{layer}" for layer in layers)


def _own(settings: Mapping[str, Any], variant: str, known: set[str]) -> dict[str, Any]:
    """The settings that are for this variant; those with its name in front win."""
    general = {key: value for key, value in settings.items() if key in known}
    named = {split_key(key)[1]: value for key, value in settings.items() if split_key(key)[0] == variant}
    return general | {key: value for key, value in named.items() if key}


def _keys(config: Variant) -> set[str]:
    return set(flatten(to_json(config)))


def _label(name: str, spread: Mapping[str, Any]) -> str:
    """The name of an SAE in its run, and what sets it apart from its neighbours of the same name."""
    parts = [f"{key.rsplit('.', 1)[-1]}{json.dumps(value, separators=('-', '-'))}" for key, value in spread.items()]
    return "_".join([name, *(re.sub(r"[^\w.+-]", "", part) for part in parts)])
