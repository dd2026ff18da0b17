"""The configuration of a run, as frozen records, and how command-line words become such records.

A run is one stream (`DataConfig`), one course (`CourseConfig`) and one or more SAEs (`Member`). Settings
are written `data.pool_tokens`, `course.tokens`, or by a variant's own names (`k`, `optim.lr`); a name
prefixed with a variant (`topk.k`) applies only to the SAEs of that variant.
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

LONGEST_LABEL = 180  # checkpoints allow 200 characters before .safetensors, and baselines add a suffix
NAMES_ELSEWHERE = {  # other libraries' names of settings
    "learning_rate": "optim.lr",
    "lr_warm_up_steps": "optim.warmup_steps",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "hook_name": "layer",
    "d_sae": "width",
    "dict_size": "width",
    "l1_coefficient": "penalty",
    "l1_penalty": "penalty",
    "auxk_alpha": "aux_weight",
    "aux_loss_coefficient": "aux_weight",
    "batch_size": "data.batch_tokens",
    "train_batch_size_tokens": "data.batch_tokens",
    "training_tokens": "course.tokens",
}
Limits = Callable[[Variant], Mapping[str, Any]]
"""Upper bounds for the defaults of a config."""
StoredLayers = Mapping[str, Sequence[int]]
"""The layers that a store holds of each hook."""


@dataclass(frozen=True)
class DataConfig:
    """The stream that all SAEs of a run share."""

    seed: int = 0
    """Seed of the read order alone. SAEs have their own seeds, so a fleet over seeds shares one stream."""
    batch_tokens: int = 4096
    pool_tokens: int | None = None
    """Tokens shuffled together in memory, in each of two pools. None: as many as fit in 2 GiB per layer and pool, at
    two bytes per number."""
    massive_norms: float | None = None
    """Rows whose norm is above this multiple of their layer's median norm are left out of scale, mean, loss and
    measurements. None (inf on the command line): every row counts. New runs default to the store's value: 10, or None
    if an import asked for it."""

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
    """Below 2,500 steps, the default is a fiftieth of the run, so that curves have about 50 points."""
    checkpoint_every_seconds: float = 300.0
    """Seconds from the end of one save to the next; longer if saving would pause training for over a twentieth of the
    time."""
    checkpoint_every_steps: int | None = None
    """If set, checkpoint_every_seconds is ignored."""
    validation_tokens: int = 131_072
    shard_width: bool = False
    """With several processes: each holds part of every dictionary and reads whole batches, for widths that do not fit
    on one device."""
    trackers: tuple[str, ...] = ()
    """Additional logs, through accelerate: wandb, tensorboard and others."""

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

    def needs(self) -> dict[str, Needs]:
        return {member.label: member.config.needs() for member in self.members}

    def to_json(self) -> dict[str, Any]:
        saes = {m.label: {"variant": m.variant, "config": to_json(m.config)} for m in self.members}
        return {"data": to_json(self.data), "course": to_json(self.course), "saes": saes}


def read_run_config(raw: Mapping[str, Any], where: str) -> RunConfig:
    """The inverse of `RunConfig.to_json`. A label names a folder, and must not lead outside the run."""
    try:
        saved = from_json(_Saved, {key: raw[key] for key in ("data", "course", "saes") if key in raw})
        outside = [label for label in saved.saes if not re.fullmatch(r"[\w+-][\w.+-]*", label)]
        if outside:
            raise ConfigInvalid(f"{where}: expected SAE labels that are folder names, found {outside[0]!r}")
        members = [
            Member(label, sae.variant, variant_registry.read_settings(sae.variant, sae.config, label))
            for label, sae in saved.saes.items()
        ]
    except StrictError as error:
        raise damaged(where, error) from None
    if not members:
        raise damaged(where, "saes: expected one or more, found none")
    return RunConfig(saved.data, saved.course, tuple(members))


def damaged(where: str, found: object) -> ConfigInvalid:
    """The error for a config.json that does not describe a run."""
    return ConfigInvalid(f"{where} is not the configuration of a run: {found}; copy the folder again")


@dataclass(frozen=True)
class _SavedSae:
    variant: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class _Saved:
    """The part of a config.json that is a `RunConfig`."""

    data: DataConfig
    course: CourseConfig
    saes: Mapping[str, _SavedSae]


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for, before the store is opened."""

    saes: tuple[Sae, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[Mapping[str, Any]] = ({},)
    recipe: Recipe | None = None
    baselines: bool = False
    """Whether to train sanity baselines too."""
    init: str | None = None
    """The folder of a trained SAE that all start from; None: from scratch."""

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, settings: Mapping[str, Any] | None = None, grid: Sequence[Mapping[str, Any]] = ({},)
    ) -> RunRequest:
        """A recipe, with the command line's changes."""
        return cls(recipe.saes, settings or {}, grid, recipe)

    @classmethod
    def of_variants(
        cls, names: Sequence[str], settings: Mapping[str, Any] | None = None, grid: Sequence[Mapping[str, Any]] = ({},)
    ) -> RunRequest:
        """Variants at their defaults, each once."""
        for name in names:
            variant_registry.module(name)  # report an unknown name first
        return cls(tuple(Sae(name, name) for name in dict.fromkeys(names)), settings or {}, grid)

    def data(self, defaults: DataConfig) -> DataConfig:
        asked = self._section("data")
        if asked.get("massive_norms") in ("inf", "Infinity"):  # JSON has neither
            asked["massive_norms"] = None
        return with_settings(defaults, asked, "data")

    def course(self, defaults: CourseConfig) -> CourseConfig:
        return with_settings(defaults, self._section("course"), "course")

    def members(self, limits: Limits, stored: StoredLayers | None = None) -> tuple[Member, ...]:
        """The SAEs. `limits` bound the variant's own defaults, never requested values; a default layer that is not in
        the store is replaced by one that is."""
        self._require_grid()
        self._require_known()
        made = [(sae, point, self._member(sae, point, limits, stored)) for sae in self.saes for point in self.grid]
        members: dict[str, Member] = {}
        for _, _, member in made:
            if len(member.label) > LONGEST_LABEL:
                raise ConfigInvalid(
                    f"{member.label:.60}...: expected a name of at most {LONGEST_LABEL} characters because it names "
                    f"files, found {len(member.label)}: use fewer settings in --grid, or a recipe with its own names"
                )
            if members.setdefault(member.label, member) != member:
                raise ConfigInvalid(
                    f"two SAEs of the run would both be called {member.label}: train one of them in a separate run"
                )
        self._require_read(tuple(members.values()))
        self._require_apart(made)
        return tuple(members.values())

    def say_unread(self, members: Sequence[Member]) -> tuple[str, ...]:
        """For each setting that was given to all SAEs, in words: which of their variants do not read it."""
        read: dict[str, set[str]] = {}
        for member in members:
            read.setdefault(member.variant, set()).update(_keys(member.config) - member.config.unread().keys())
        known = [key for key in self._given if any(key in of for of in read.values())]
        without = {key: [name for name, of in read.items() if key not in of] for key in known}
        return tuple(f"{key} is not read by {', '.join(names)}" for key, names in without.items() if names)

    @property
    def _given(self) -> tuple[str, ...]:
        """The settings of the options, --set and --grid, each once."""
        return tuple(dict.fromkeys([*self.settings, *(key for point in self.grid for key in point)]))

    def _require_grid(self) -> None:
        """Refuse a grid over what all SAEs share, or over what is set besides."""
        keys = [key for point in self.grid for key in point]
        misplaced = [key for key in keys if split_key(key)[0] in ("data", "course")]
        if misplaced:
            raise ConfigInvalid(
                f"--grid is for SAEs that share data and course, found {misplaced[0]}: set it with --set, and "
                "start a run for each value"
            )
        overrides = [(key, other) for key in keys for other in self.settings if self._overrides(key, other)]
        if overrides:
            key, other = overrides[0]
            raise ConfigInvalid(
                f"expected {key} only in --grid, found {other}={self.settings[other]} in an option or --set too: "
                "leave out one of the two"
            )

    def _overrides(self, grid_key: str, key: str) -> bool:
        """Whether a key of the grid overrides a setting for every SAE."""
        variants = {sae.variant for sae in self.saes}
        split = ((name, *split_key(name)) for name in (grid_key, key))
        own, other = (rest if head in variants else name for name, head, rest in split)
        return own == other and (grid_key in (key, own) or len(variants) == 1)

    def _require_apart(self, made: Sequence[tuple[Sae, Mapping[str, Any], Member]]) -> None:
        """Refuse a setting that makes two different SAEs of a recipe the same."""
        for (one, point, first), (other, other_point, second) in itertools.combinations(made, 2):
            if point != other_point or first.config != second.config:
                continue
            asked = _own({**self.settings, **point}, one.variant, _keys(first.config))
            overridden = [key for key in asked if one.settings.get(key) != other.settings.get(key)]
            if overridden:
                raise ConfigInvalid(
                    f"{first.label} and {second.label} differ in {overridden[0]} in the recipe, and would become the "
                    f"same SAE: leave {overridden[0]} to the recipe"
                )

    def _require_read(self, members: Sequence[Member]) -> None:
        """Refuse settings that none of the SAEs reads."""
        known = [(member, _keys(member.config)) for member in members]
        for key in self._given:
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

    def _member(self, sae: Sae, point: Mapping[str, Any], limits: Limits, stored: StoredLayers | None) -> Member:
        config = variant_registry.config_type(sae.variant)()
        known = _keys(config)
        varied = _own(point, sae.variant, known)
        asked = _own(self.settings, sae.variant, known) | varied
        shared = self.recipe.settings if self.recipe else {}
        of_recipe = {key: value for key, value in shared.items() if key in known} | dict(sae.settings)
        draft = with_settings(config, of_recipe | asked, sae.label)
        with name_sae(sae.label):
            adapted = smaller_defaults(draft, {key: limit for key, limit in limits(draft).items() if key not in asked})
            if stored:
                # to_layer=null asks for the default, as leaving it out does.
                chosen = [key for key, value in asked.items() if value is not None]
                adapted |= stored_layer(draft, chosen, stored)
        config = with_settings(draft, adapted, sae.label)
        with name_sae(sae.label):
            require_bounds(config)
        return Member(_label(sae.label, varied), sae.variant, config)

    def _section(self, head: str) -> dict[str, Any]:
        """The settings below a head such as `data`, without it."""
        given = {**(self.recipe.settings if self.recipe else {}), **self.settings}
        return {split_key(key)[1]: value for key, value in given.items() if split_key(key)[0] == head}

    def _require_known(self) -> None:
        """Refuse a key that no SAE of the run has."""
        names = dict.fromkeys(sae.variant for sae in self.saes)
        by_variant = {name: list(flatten(to_json(variant_registry.config_type(name)()))) for name in names}
        everything = {key for keys in by_variant.values() for key in keys}
        for key in self._given:
            head, rest = split_key(key)
            if head in ("data", "course"):
                continue
            if key == "k" and key not in everything:
                option, instead = "k", "target_l0"
                if key in self.settings:
                    option, instead = "--k", f"--set target_l0={self.settings[key]}"
                advice = f", or ask for {instead}" if "target_l0" in everything else ""
                raise ConfigInvalid(
                    f"{', '.join(by_variant)}: the number of active latents is not fixed: leave out {option}{advice}"
                )
            if key not in everything and not (head in by_variant and rest in by_variant[head]):
                shared = {f"data.{k}" for k in to_json(DataConfig())} | {f"course.{k}" for k in to_json(CourseConfig())}
                here = NAMES_ELSEWHERE.get(key.rpartition(".")[2])
                own = nearest(rest, by_variant[head]) if head in by_variant else nearest(key, everything | shared)
                hint = f" (here it is {here})" if here in everything | shared else own
                raise ConfigInvalid(f"unknown setting {key!r} of {', '.join(by_variant)}{hint}")


def smaller_defaults(config: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The limit for each setting whose default exceeds it."""
    own = {key: getattr(config, key, None) for key in limits}
    return {key: limits[key] for key, value in own.items() if value is not None and value > limits[key]}


def stored_layer(config: Variant, asked: Iterable[str], stored: StoredLayers) -> dict[str, Any]:
    """The store's only layer, in place of a default layer that it lacks; an error if it has several to choose from."""
    needs = config.needs()
    sides = {"layer": (needs.hook, needs.inputs), "to_layer": (needs.to_hook or needs.hook, needs.targets or ())}
    sides["layers"] = sides["layer"]
    layers, absent = stored.get(needs.hook, ()), []
    for key, (hook, wanted) in sides.items():
        if hasattr(config, key) and key not in asked and stored.get(hook) and not set(wanted) <= set(stored[hook]):
            absent.append(key)
    if not absent or len(layers) == 1:
        return {"layer": layers[0]} if "layer" in absent else {}
    choices = ", and with ".join(_choices(key, stored[sides[key][0]]) for key in absent)
    of_hook = "" if needs.hook == RESID else f" of {needs.hook}"
    raise ConfigInvalid(
        f"the store holds layers {', '.join(map(str, layers))}{of_hook} and not the default: choose with {choices}"
    )


def _choices(key: str, layers: Sequence[int]) -> str:
    """The options that choose a layer."""
    if key == "layers":
        return f"--set layers={','.join(map(str, layers))}"
    option = "--layer " if key == "layer" else f"--set {key}="
    return " or ".join(f"{option}{layer}" for layer in layers)


def _own(settings: Mapping[str, Any], variant: str, known: set[str]) -> dict[str, Any]:
    """The settings for this variant; those prefixed with its name win."""
    general = {key: value for key, value in settings.items() if key in known}
    named = {split_key(key)[1]: value for key, value in settings.items() if split_key(key)[0] == variant}
    return general | {key: value for key, value in named.items() if key}


def _keys(config: Variant) -> set[str]:
    return set(flatten(to_json(config)))


def _label(name: str, varied: Mapping[str, Any]) -> str:
    """The name of an SAE in its run, with the grid settings that distinguish it from others of the same name."""
    parts = [f"{key.rsplit('.', 1)[-1]}{json.dumps(value, separators=('-', '-'))}" for key, value in varied.items()]
    return "_".join([name, *(re.sub(r"[^\w.+-]", "", part) for part in parts)])
