"""tiers: does a hierarchy of latents hold together, and what does each tier do to the model?

1. Composition, from the weights alone: decoder rows as non-negative sums of those of the tier below.
2. A pass over test windows: activity of each tier, and the latent that dominates it on each token.
3. Causal tracing, if the model is available: predictions without a tier, with it alone, without the latents
   that are composed of nothing, without single latents; from one clean pass of the layers above.
4. What those latents fire on, and which latents of the tier below make up the best-composed ones.

Tier numbers in results count from 1. A plain SAE gets equal shares of its dictionary as tiers.
N tokens, F latents, D residual width, M tiers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.strict_json import to_json
from ..context.stored_windows import TextCount, ordinary_rows, read_windows, say_if_fewer, sums_of_codes
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .measures.assignment import Assignment, evenly_spread, saved_composition, tiers_of
from .measures.splice_effects import Effect, Tracer, Tracers
from .measures.tiers import (
    EXPLAINED,
    Activity,
    KeptTokens,
    Strongest,
    adjusted_mutual_information,
    dominant_latents,
    explained,
    explained_by,
    explained_by_few,
    fit_all,
    fit_few,
    normalised_mutual_information,
    random_rows,
    tier_activity,
)

UNTRACED = "causal tracing is only for SAEs that read and write one layer"
KEPT = 5
LEAST_ROOM = 1e-3  # nats between mean ablation and the reconstruction, below which nothing can be restored


@dataclass(frozen=True)
class Config:
    windows: int = 128
    """Windows of the test split, for activity and information."""
    trace_windows: int = 16
    """How many of these are traced; 0: no tracing."""
    trace_latents: int = 2
    """Latents of each tier that are traced one by one: the most active in the traced windows."""
    batch_windows: int = 16
    tiers: int = 3
    """For SAEs trained without tiers."""
    parts: int = 8
    """Latents of the tier below that a composed one may consist of."""
    fitted_rows: int = 128
    """Decoder rows of a tier that are fitted by all of the tier below."""
    listed: int = 12
    """Latents composed of nothing, and best-composed latents of each tier, to list with their strongest tokens."""
    seed: int = 51_866
    """Seed of the comparisons with chance. SAEs are initialised from small seeds: one of those would draw the very rows
    that a dictionary started from."""


@dataclass(eq=False)
class Seen:
    tiers: Assignment
    by_few: Tensor  # [F], R^2 of each latent's row fitted by few of the tier below; NaN if there is none below
    activity: Activity = field(init=False)
    dominant: list[Tensor] = field(default_factory=list)
    strongest: Strongest = field(init=False)
    traced: tuple[int, ...] = ()  # latents that are traced one by one
    text: TextCount = field(default_factory=TextCount)

    def __post_init__(self) -> None:
        nothing = self.by_few.new_zeros(0, len(self.by_few))
        self.activity = tier_activity(nothing, self.tiers.of_latent, self.tiers.count)
        self.strongest = Strongest.none(KEPT, len(self.by_few), self.by_few.device)

    @cached_property
    def composed(self) -> Tensor:
        """bool [F]: of the first tier, or made up by few of the tier below."""
        return self.tiers.members(0) | (self.by_few >= EXPLAINED)

    def take(self, acts_NF: Tensor, places_N: Tensor) -> None:
        self.activity += tier_activity(acts_NF, self.tiers.of_latent, self.tiers.count)
        self.dominant.append(dominant_latents(acts_NF, self.tiers.of_latent, self.tiers.count).cpu())
        self.strongest = self.strongest.with_batch(acts_NF, places_N)


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    say_if_fewer(context, "tiers", config)
    composition = {subject: compose(subject, config) for subject in subjects}
    seen = {subject: Seen(tiers_of(subject, config.tiers), by_few) for subject, (_, by_few) in composition.items()}
    effects: dict[LoadedSae, dict[str, Effect]] = {subject: {} for subject in subjects}
    impossible, missing = obstacles(context, config)
    words = KeptTokens(context)
    is_traced = config.trace_windows > 0 and not (impossible or missing)
    traced = [subject for subject in subjects if is_traced and subject.is_single_layer]
    tracers = Tracers(context, traced) if traced else None
    tokens = windows = 0
    if traced:
        choose_traced(context, {subject: seen[subject] for subject in traced}, config)
    for batch in read_windows(context, subjects, "tiers", config.windows, config.batch_windows):
        words.read(batch)
        share = batch.slice(0, max(0, config.trace_windows - windows))  # whatever the batch size
        at_layer = tracers.of(share) if tracers and len(share) else {}
        for subject in subjects:
            acts = subject.encode(batch)
            rows = ordinary_rows(context, subject, batch)
            seen[subject].text.add(batch, rows)
            seen[subject].take(acts[rows], tokens + rows[batch.keep].nonzero().view(-1))
            if at_layer and subject.is_single_layer:
                total = effects[subject]
                for name, effect in trace(at_layer[subject.layer], subject, acts[: len(share)], seen[subject]).items():
                    total[name] = total.get(name, Effect()) + effect
        tokens, windows = tokens + int(batch.keep.sum()), windows + len(batch)
    for subject in subjects:
        metrics = measure(seen[subject], composition[subject][0], effects[subject], config)
        listed = {"tiers": seen[subject].tiers.source, "uncomposed": list_uncomposed(seen[subject], words, config)}
        listed["compositions"] = list_compositions(subject, seen[subject], words, config)
        listed["traced"] = list_traced(seen[subject], effects[subject], words)
        remark = impossible if subject.is_single_layer else UNTRACED
        lacks = None if remark else missing
        text = seen[subject].text.and_traced(config.trace_windows if effects[subject] else 0)
        yield Result(
            subject, to_json(config), metrics, unstructured=listed, remark=remark, missing=lacks, measured_on=text
        )


def obstacles(context: Context, config: Config) -> tuple[str | None, str | None]:
    """Why nothing can ever be traced on this store, and what is missing for now."""
    if config.trace_windows <= 0:
        return None, None
    if context.without_tokens:
        return f"causal tracing needs tokens: {context.without_tokens}", None
    reason = context.why_no_model()
    return None, reason and f"causal tracing needs the model: {reason}"


def choose_traced(context: Context, seen: Mapping[LoadedSae, Seen], config: Config) -> None:
    """Choose the latents to trace from all windows that will be traced."""
    count, title = min(config.windows, config.trace_windows), "tiers: latents to trace"
    mass = sums_of_codes(context, list(seen), title, count, config.batch_windows, lambda acts: acts.sum(0))
    for subject, one in seen.items():
        one.traced = most_active(mass[subject][0], one.tiers, config.trace_latents)


def compose(subject: LoadedSae, config: Config) -> tuple[dict[str, float], Tensor]:
    """Coverage of each tier but the first, and R^2 [F] of each latent's row fitted by few of the tier below."""
    tiers, W_dec = tiers_of(subject, config.tiers), subject.sae.W_dec.detach()
    generator = torch.Generator().manual_seed(config.seed)
    by_few = W_dec.new_full((len(W_dec),), torch.nan)
    metrics: dict[str, float] = {}
    for tier in range(1, tiers.count):
        mine, atoms = tiers.members(tier), W_dec[tiers.members(tier - 1)]
        if not mine.any() or not len(atoms):
            continue
        by_few[mine] = few = explained_by_few(W_dec[mine], atoms, config.parts)
        found = coverage(W_dec[evenly_spread(mine, config.fitted_rows)], atoms, config.parts, generator)
        found |= {"coverage_few": _share(few), "r_squared_few": float(few.mean())}
        learned = saved_composition(subject, tier, int(mine.sum()), len(atoms))
        if learned is not None:
            found["coverage_learned"] = _share(explained_by(learned, W_dec[mine], atoms))
        metrics |= {f"{name}_{tier + 1}": value for name, value in found.items()}
    return metrics, by_few


def coverage(rows_RD: Tensor, atoms_AD: Tensor, parts: int, generator: torch.Generator) -> dict[str, float]:
    """Coverage by all atoms, and that of random rows by all and by few."""
    random_RD = random_rows(rows_RD, generator)
    both = torch.cat([rows_RD, random_RD])
    own, chance = explained(both, fit_all(both, atoms_AD) @ atoms_AD).chunk(2)
    return {
        "coverage": _share(own),
        "coverage_chance": _share(chance),
        "r_squared": float(own.mean()),
        "coverage_few_chance": _share(explained_by_few(random_RD, atoms_AD, parts)),
    }


def trace(tracer: Tracer, subject: LoadedSae, acts_WTF: Tensor, seen: Seen) -> dict[str, Effect]:
    """Predictions with parts of the codes only, with all of them, and with none."""
    tiers = range(seen.tiers.count)
    kept = {f"without_{tier + 1}": ~seen.tiers.members(tier) for tier in tiers}
    kept |= {f"only_{tier + 1}": seen.tiers.members(tier) for tier in tiers}
    every_F = torch.ones_like(seen.composed)
    kept |= {"without_uncomposed": seen.composed, "all": every_F}
    latents = torch.arange(len(every_F), device=every_F.device)
    kept |= {f"without_latent_{latent}": latents != latent for latent in seen.traced}

    def decoded(members_F: Tensor) -> Tensor:
        return subject.decode(acts_WTF * members_F)

    return {**tracer.baselines, **tracer.effects({name: partial(decoded, members) for name, members in kept.items()})}


def measure(
    seen: Seen, composition: Mapping[str, float], effects: Mapping[str, Effect], config: Config
) -> dict[str, dict[str, Any]]:
    activity = {
        f"{name}_{tier + 1}": value
        for tier in range(seen.tiers.count)
        for name, value in seen.activity.of_tier(seen.tiers.members(tier), tier).items()
    }
    return {
        "tier_information": information(torch.cat(seen.dominant), config.seed),
        "tier_activity": activity,
        "composition": dict(composition),
        "uncomposed": uncomposed(seen, effects),
        "causal": causal(effects, seen.tiers.count),
    }


def information(dominant_NM: Tensor, seed: int) -> dict[str, float]:
    """How much the dominant latents of two tiers say about each other, for every pair of tiers."""
    generator = torch.Generator().manual_seed(seed)
    tiers = dominant_NM.shape[1]
    found: dict[str, float] = {}
    for first, second in combinations(range(tiers), 2):
        pair = dominant_NM[:, first], dominant_NM[:, second]
        found[f"nmi_{first + 1}_{second + 1}"] = normalised_mutual_information(*pair)
        found[f"adjusted_nmi_{first + 1}_{second + 1}"] = adjusted_mutual_information(*pair, generator)
    return found


def uncomposed(seen: Seen, effects: Mapping[str, Effect]) -> dict[str, float]:
    """What is carried by latents that no few of the tier below make up."""
    others, activity = ~seen.composed, seen.activity
    found = {
        "latents": int(others.sum()),
        "l0": float(activity.fired[others].sum() / max(activity.tokens, 1)),
        "mass_share": float(activity.mass[others].sum() / activity.mass.sum().clamp_min(1e-30)),
    }
    if effects:
        found["loss_carried"] = effects["without_uncomposed"].loss - effects["all"].loss
        found["kl_carried"] = effects["without_uncomposed"].kl - effects["all"].kl
    return found


def causal(effects: Mapping[str, Effect], tiers: int) -> dict[str, float]:
    """Effects of removing a tier, and of putting it alone into a mean-ablated residual."""
    if not effects:
        return {}
    room = effects["mean"].kl - effects["all"].kl
    found = {"kl_sae": effects["all"].kl, "kl_mean_ablation": effects["mean"].kl, "loss_clean": effects["clean"].loss}
    for tier in range(1, tiers + 1):
        found[f"kl_without_{tier}"] = effects[f"without_{tier}"].kl
        found[f"loss_increase_without_{tier}"] = effects[f"without_{tier}"].loss - effects["all"].loss
        restored = effects["mean"].kl - effects[f"only_{tier}"].kl
        found[f"restored_by_{tier}"] = restored / room if room > LEAST_ROOM else float("nan")
    return found


def most_active(mass_F: Tensor, tiers: Assignment, count: int) -> tuple[int, ...]:
    """The latents of each tier with the largest activation, if they have any."""
    found: list[int] = []
    for tier in range(tiers.count):
        mass = torch.where(tiers.members(tier), mass_F, 0.0)
        best = mass.topk(min(count, len(mass)))
        found += best.indices[best.values > 0].tolist()
    return tuple(found)


def list_traced(seen: Seen, effects: Mapping[str, Effect], words: KeptTokens) -> list[dict[str, Any]]:
    """What predictions lose without single latents, in nats per token, and what these fire on."""
    listed = []
    for latent in seen.traced:
        effect, every_one = effects[f"without_latent_{latent}"], effects["all"]
        lost = {"kl_increase": effect.kl - every_one.kl, "loss_increase": effect.loss - every_one.loss}
        tokens = [words.token(place) for _, place in seen.strongest.of(latent)]
        listed.append(_facts(seen, latent) | lost | {"tokens": tokens})
    return listed


def list_uncomposed(seen: Seen, words: KeptTokens, config: Config) -> list[dict[str, Any]]:
    """The most active latents composed of nothing, and their strongest tokens."""
    mass = torch.where(seen.composed, 0.0, seen.activity.mass)
    chosen = mass.topk(min(config.listed, len(mass))).indices.tolist()
    return [
        _facts(seen, latent)
        | {"tokens": [{"token": words.token(place), "activation": value} for value, place in seen.strongest.of(latent)]}
        for latent in chosen
        if mass[latent] > 0
    ]


def _facts(seen: Seen, latent: int) -> dict[str, Any]:
    share = float(seen.activity.fired[latent] / max(seen.activity.tokens, 1))
    return {"latent": latent, "tier": int(seen.tiers.of_latent[latent]) + 1, "fired_share": share}


def list_compositions(subject: LoadedSae, seen: Seen, words: KeptTokens, config: Config) -> list[dict[str, Any]]:
    """For each tier but the first, the firing latents that few of the tier below make up best."""
    W_dec, strongest, listed = subject.sae.W_dec.detach(), seen.strongest, []
    for tier in range(1, seen.tiers.count):
        below = seen.tiers.members(tier - 1).nonzero().view(-1)
        mine = (seen.tiers.members(tier) & (seen.activity.fired.to(W_dec.device) > 0)).nonzero().view(-1)
        if not len(mine) or not len(below):
            continue
        best = seen.by_few[mine].topk(min(config.listed, len(mine)))
        chosen, weights = fit_few(W_dec[mine[best.indices]], W_dec[below], config.parts)
        for row, latent in enumerate(mine[best.indices].tolist()):
            parts = sorted(zip(weights[row].tolist(), below[chosen[row]].tolist(), strict=True), reverse=True)
            listed.append(
                {
                    "latent": latent,
                    "tier": tier + 1,
                    "r_squared": float(best.values[row]),
                    "tokens": [words.token(place) for _, place in strongest.of(latent)],
                    "parts": [
                        {"latent": part, "weight": weight, "tokens": [words.token(at) for _, at in strongest.of(part)]}
                        for weight, part in parts
                        if weight > 0
                    ],
                }
            )
    return listed


def _share(r_squared_R: Tensor) -> float:
    """The share of rows that are explained."""
    return float((r_squared_R >= EXPLAINED).double().mean())


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=(
        "tier_information.adjusted_nmi_1_2",
        "composition.coverage_few_2",
        "uncomposed.mass_share",
        "uncomposed.loss_carried",
        "causal.loss_increase_without_1",
        "causal.loss_increase_without_3",
    ),
    least={"tiers": 1, "trace_latents": 0, "parts": 1, "fitted_rows": 1, "listed": 0},
    # 2: massive rows keep their residual and do not count; 3: as many windows are traced as requested; 4: as many tiers
    # as were saved, and no empty ones
    revision=4,
)
