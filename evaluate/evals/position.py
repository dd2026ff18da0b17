"""position: do latents keep to a place in the window, and do codes know about order?

1. A pass over validation windows gives each latent of an SAE without masks the range where its activation is
   highest: static slicing, the control. An SAE with masks keeps those it was trained with.
2. A pass over test windows: specialisation retention (share of activation inside the range), positional
   fidelity (correlation of the profile with the intended mask).
3. Order probes on the same windows: the range a token is in, and which of two tokens came first, from a few latents,
   and from the residual itself for reference.

N tokens, W windows, T context, F latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.strict_json import to_json
from ..context.loaded_sae import layers_of
from ..context.stored_windows import TextCount, ordinary_rows, read_windows, say_if_fewer
from ..errors import NotApplicable
from ..model.batches import Windows
from ..model.logistic_regression import unconverged
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, beyond, remark_of
from .measures.assignment import Assignment, is_bound, ranges_of, saved
from .measures.position import (
    Profile,
    accuracy,
    assign_ranges,
    equal_shares,
    fidelity,
    hard_mask,
    profile,
    retention,
    soft_mask,
)

STATIC = "static slicing"
UNPROBED = "order is not probed: the test windows hold only documents that the probes are trained on"
UNPAIRED = "which of two tokens came first is not probed: too few windows hold two chosen tokens of one document"


@dataclass(frozen=True)
class Config:
    windows: int = 128
    """Of the test split, and of the validation split to assign ranges."""
    batch_windows: int = 16
    ranges: int = 4
    """For SAEs trained without ranges."""
    least_firings: int = 20
    """A latent that fired less often has no meaningful profile."""
    probe_k: tuple[int, ...] = (1, 5, 20)
    """How many latents an order probe may read."""
    probe_tokens: int = 24
    """Tokens of each window that probes see."""
    seed: int = 0


@dataclass(eq=False)
class Sample:
    """Some tokens of every window in random order, the same for every SAE of the same layers; special and massive ones
    only if no others are left. Rows are kept off the device, and codes sparse: dense, those of one wide SAE take a
    gigabyte, and all SAEs' are kept."""

    tokens: int
    generator: torch.Generator
    positions: list[Tensor] = field(default_factory=list)  # [w, P] of each batch
    kept: list[Tensor] = field(default_factory=list)  # bool [w, P], neither special nor massive
    documents: list[Tensor] = field(default_factory=list)  # [w, P]
    rows: dict[LoadedSae | tuple[int, ...], list[Tensor]] = field(default_factory=dict)  # codes; by layers, residuals

    def begin(self, batch: Windows, rows_WT: Tensor, layers: Iterable[tuple[int, ...]]) -> None:
        """Draw from the rows of the next batch that count."""
        rows, count = rows_WT.cpu(), min(self.tokens, batch.context)
        dice = torch.rand(rows.shape, generator=self.generator)
        positions = torch.where(rows, dice, -1.0).topk(count, dim=1).indices
        assert batch.documents is not None, "windows of a store have documents"
        self.positions.append(positions)
        self.kept.append(rows.gather(1, positions))
        self.documents.append(batch.documents.cpu().gather(1, positions))
        for one in layers:
            self.rows.setdefault(one, []).append(self._drawn(batch.x(one)).cpu())

    def take(self, subject: LoadedSae, acts_WTF: Tensor) -> None:
        self.rows.setdefault(subject, []).append(self._drawn(acts_WTF).to_sparse().cpu())

    def of(self, key: LoadedSae | tuple[int, ...]) -> Tensor:
        """[W, P, F]"""
        return torch.cat(self.rows[key]).to_dense()

    def _drawn(self, table_WTF: Tensor) -> Tensor:
        place = self.positions[-1].to(table_WTF.device)
        return table_WTF.gather(1, place[:, :, None].expand(-1, -1, table_WTF.shape[2]))

    def sides(self) -> tuple[Tensor, Tensor]:
        """bool [W, P] each: tokens of the first half of the windows, and of other documents in the second half."""
        kept, documents = torch.cat(self.kept), torch.cat(self.documents)
        first = torch.arange(len(kept), device=kept.device) < len(kept) // 2
        train = kept & first[:, None]
        return train, kept & ~first[:, None] & ~torch.isin(documents, documents[train])


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    length = context.manifest.context
    assigned = {subject: ranges_of(subject, config.ranges, length) for subject in subjects}
    plain = [subject for subject, ranges in assigned.items() if ranges is None]
    static: dict[LoadedSae, Tensor] = {}
    chosen_on: dict[LoadedSae, TextCount] = {}
    try:
        seen, chosen_on = profiles(context, plain, "position: ranges", config, "validation") if plain else ({}, {})
        static = {subject: assign_ranges(seen.pop(subject), config.ranges) for subject in plain}
    except NotApplicable as obstacle:  # concerns only SAEs that have no ranges yet
        yield from (Failure(subject, obstacle) for subject in plain)
        subjects = [subject for subject in subjects if subject not in plain]
    if not subjects:
        return
    samples = make_samples(subjects, config)
    found, read = profiles(context, subjects, "position", config, "test", samples)
    resid = {
        (places, layers): order_probes(samples[places], samples[places].of(layers), length, config, (None,))
        for places, layers in {(layers_of([subject]), subject.layers) for subject in subjects}
    }
    for subject in subjects:
        places = layers_of([subject])
        ranges = assigned[subject] or Assignment(static[subject], config.ranges, STATIC)
        order, converged = order_probes(samples[places], samples[places].of(subject), length, config, config.probe_k)
        of_resid, also_converged = resid[places, subject.layers]
        order |= of_resid
        metrics = {"specialisation": specialisation(subject, found[subject], ranges, config), "order": order}
        source = {"ranges": ranges.source}
        absent = UNPROBED if not order else UNPAIRED if "first_chance" not in order else None
        wide = beyond("k", config.probe_k, subject.width) if order else None
        is_measured = metrics["specialisation"]["measured"]
        rare = None if is_measured else f"no latent with a range fired {config.least_firings} times"
        remark = remark_of(absent, rare, wide, unconverged(converged + also_converged))
        text = f"{read[subject]}; ranges by the {chosen_on[subject]}" if subject in chosen_on else str(read[subject])
        yield Result(subject, to_json(config), metrics, unstructured=source, remark=remark, measured_on=text)


def make_samples(subjects: Sequence[LoadedSae], config: Config) -> dict[tuple[int, ...], Sample]:
    """Samples by all layers that an SAE reads or writes, because rows that are massive only elsewhere count. All draw
    the same random numbers."""
    return {
        layers_of([subject]): Sample(config.probe_tokens, torch.Generator().manual_seed(config.seed))
        for subject in subjects
    }


def profiles(
    context: Context,
    subjects: Sequence[LoadedSae],
    title: str,
    config: Config,
    split: str,
    samples: Mapping[tuple[int, ...], Sample] | None = None,
) -> tuple[dict[LoadedSae, Profile], dict[LoadedSae, TextCount]]:
    """Activation by position over some windows of a split, and how much text that is; `samples` are drawn on the
    way."""
    say_if_fewer(context, title, config, split)
    seen: dict[LoadedSae, Profile] = {}
    read = {subject: TextCount(split) for subject in subjects}
    for batch in read_windows(context, subjects, title, config.windows, config.batch_windows, split):
        rows = {layers_of([subject]): ordinary_rows(context, subject, batch) for subject in subjects}
        for places, sample in (samples or {}).items():
            sample.begin(batch, rows[places], {one.layers for one in subjects if layers_of([one]) == places})
        for subject in subjects:
            acts, places = subject.encode(batch), layers_of([subject])
            read[subject].add(batch, rows[places])
            seen[subject] = profile(acts, rows[places], seen.get(subject))
            if samples is not None:
                samples[places].take(subject, acts)
    return seen, read


def specialisation(subject: LoadedSae, seen: Profile, ranges: Assignment, config: Config) -> dict[str, Any]:
    """Measures over latents that have a range and fired often enough."""
    kept = retention(seen, ranges.of_latent, ranges.count)
    faithful = fidelity(seen, meant_mask(subject, ranges, len(seen.tokens)))
    often = is_bound(ranges) & (seen.firings >= config.least_firings)
    mass = seen.mass.sum(0)[often]
    shaped = often & ~faithful.isnan()
    found: dict[str, Any] = {
        "measured": int(often.sum()),
        "bound": int(is_bound(ranges).sum()),
        "chance": 1 / ranges.count,
    }
    if often.any():
        found["retention"] = float(kept[often].mean())
        found["retention_by_mass"] = float((kept[often] * mass).sum() / mass.sum())
    if shaped.any():
        found["fidelity"] = float(faithful[shaped].mean())
    return found


def meant_mask(subject: LoadedSae, ranges: Assignment, context: int) -> Tensor:
    """float64 [T, F]: the soft mask that was learned, or the range's own."""
    centre = saved(subject, "mask.centre")
    if centre is None:
        return hard_mask(ranges.of_latent, context, ranges.count)
    sigma = saved(subject, "mask.sigma")
    return soft_mask(centre, context / 8 if sigma is None else sigma, context)


def order_probes(
    sample: Sample, rows_WPF: Tensor, context: int, config: Config, sizes: Sequence[int | None]
) -> tuple[dict[str, float], list[bool]]:
    """Test accuracy by number of columns (None: all, of the residual), and whether each probe converged. Training and
    test share no document."""
    positions_WP, documents_WP, (train, test) = torch.cat(sample.positions), torch.cat(sample.documents), sample.sides()
    bucket = equal_shares(context, config.ranges).to(positions_WP.device)[positions_WP]
    tasks = {
        "range": (rows_WPF, bucket, train, test),
        "first": (*came_first(rows_WPF, positions_WP), in_pairs(train, documents_WP), in_pairs(test, documents_WP)),
    }
    found, converged = dict[str, float](), list[bool]()
    for name, (rows, labels, seen, unseen) in tasks.items():
        if len(labels[seen].unique()) < 2 or not unseen.any():
            continue
        answers = labels[unseen]
        found[f"{name}_chance"] = float(torch.bincount(answers).max() / len(answers))
        for k in sizes:
            score, is_done = accuracy(rows[seen], labels[seen], rows[unseen], answers, k)
            found[f"{name}_residual" if k is None else f"{name}_top_{k}"] = score
            converged.append(is_done)
    return found, converged


def came_first(acts_WPF: Tensor, positions_WP: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of the codes of two tokens of a window, and whether the first of them came first."""
    pairs = acts_WPF.shape[1] // 2
    left, right = acts_WPF[:, :pairs], acts_WPF[:, pairs : 2 * pairs]
    return left - right, (positions_WP[:, :pairs] < positions_WP[:, pairs : 2 * pairs]).long()


def in_pairs(chosen_WP: Tensor, documents_WP: Tensor) -> Tensor:
    """bool: pairs of two chosen tokens of one document; two documents would give the order away."""
    pairs = chosen_WP.shape[1] // 2
    left, right = slice(pairs), slice(pairs, 2 * pairs)
    return chosen_WP[:, left] & chosen_WP[:, right] & (documents_WP[:, left] == documents_WP[:, right])


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=("specialisation.retention", "specialisation.fidelity", "order.range_top_5", "order.first_top_5"),
    least={"ranges": 1, "probe_k": 1, "probe_tokens": 1},
    # 2: order probes see no massive rows, whose lengths gave their positions away; 3: the position of BOS does not
    # count as a silent one of the first range; 4: pairs of tokens lie in one document
    revision=4,
)
