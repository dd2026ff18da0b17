"""By layer, how much attention explains of codes and counts in the guidance; by tier, how active latents are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...evals.measures.assignment import EQUAL_SHARES
from ..figures.panels import STEP, Lines, legend_of, looks_of, mark_of, series_of
from ..figures.records import Record
from ..figures.style import INK, LINES, caption, first_of, new_figure, shades

CONTRIBUTION, WEIGHT, SHARE = "attention/contribution_", "mixing/weight_", "share_"
ACTIVE, ACTIVITY = "active_share_", "tiers/activity_"  # of a tier: as measured, and as training logs it
MEASURED = (  # by the evaluation `attention` for each layer: name, title, unit and factor
    (SHARE, "Similarity of codes explained by attention", "% of variance, beyond nearness", 100),
    ("similarity_gain_", "How much more alike attended tokens are", "cosine above the row's mean", 1.0),
)
MOST_LABELLED = 18  # bars with room for their numbers above them
MOST_TIERS = 8  # of an SAE
MOST_BESIDE = 4  # SAEs, with a group of bars each, in a panel that shares its row with others


def measured_layers(record: Record) -> list[int]:
    """The layers that the evaluation `attention` saw."""
    return _numbered(record, "attention", "contribution", SHARE)


def _numbered(record: Record, evaluation: str, group: str, prefix: str) -> list[int]:
    """The numbers after a prefix in the names of a result's metrics."""
    names = record.documents.get(evaluation, {}).get("eval_result_metrics", {}).get(group, {})
    return sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))


def draw_contribution(records: Sequence[Record]) -> Figure | None:
    """For each layer: the similarity it explains, a group of bars per SAE; its part in training, a panel per SAE."""
    measured = [record for record in records if measured_layers(record)]
    logged = [record for record in records if record.numbered(CONTRIBUTION)]
    panels = len(MEASURED) * bool(measured) + len(logged)
    if not panels:
        return None
    layers = sorted({layer for r in records for layer in (*measured_layers(r), *r.numbered(CONTRIBUTION))})
    if len(measured) > MOST_BESIDE:  # in one row, they would make a figure too wide to read on a page
        columns = 2 if len(measured) <= 2 * MOST_BESIDE else 3
        figure, axes = new_figure(panels, columns, height=3.6, wide=len(MEASURED))
    else:
        figure, axes = new_figure(panels, columns=2 if panels in (2, 4) else 3, width=5.0, height=3.6)
    for axis, (metric, title, unit, factor) in zip(axes, MEASURED if measured else (), strict=False):
        parts = {
            f"layer {layer}": [record.metric("attention", f"contribution.{metric}{layer}") for record in measured]
            for layer in layers
        }
        draw_parts(axis, [record.name for record in measured], parts, factor)
        caption(axis, "", "", unit)
        axis.set_title(title, fontsize=10, color=INK, pad=24)  # above the legend
    for axis, record in zip(axes[panels - len(logged) :], logged, strict=True):
        draw_layers(axis, record, CONTRIBUTION, layers, "share of guided similarity (sum 1)")
    figure.suptitle("Contribution by layer", fontsize=12, color=INK)
    return figure


def draw_mixing(records: Sequence[Record]) -> Figure | None:
    """The weight of each layer's attention in the guidance, over training; a panel per SAE."""
    mixed = [record for record in records if record.numbered(WEIGHT)]
    if not mixed:
        return None
    layers = sorted({layer for record in mixed for layer in record.numbered(WEIGHT)})
    temperature = Lines("Temperature", "softmax temperature", series_of("mixing/temperature"))
    has_temperature = temperature.finds(mixed)
    figure, axes = new_figure(len(mixed) + has_temperature)
    for record, axis in zip(mixed, axes, strict=False):
        axis.set_ylim(-0.02, 1.02)
        draw_layers(axis, record, WEIGHT, layers, "mixing weight (sum 1)")
    if has_temperature:
        temperature.draw(axes[-1], mixed, looks_of(records))
        for text in axes[-1].legend(*legend_of(mixed, records, True), fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)
    figure.suptitle("Mixing of attention layers", fontsize=12, color=INK)
    return figure


def draw_layers(axis: Axes, record: Record, prefix: str, layers: Sequence[int], y: str) -> None:
    """A number that an SAE logged for each layer, over training. A layer has the same look in every panel."""
    colours = dict(zip(layers, shades(len(layers)), strict=True))
    for layer, name in record.numbered(prefix).items():
        line = LINES[layers.index(layer) % len(LINES)]
        steps, values = record.series(name)
        style = {"color": colours[layer], "ls": line, "marker": mark_of(values)}
        axis.plot(steps, values, **style, lw=1.8, label=f"layer {layer}")
    caption(axis, record.name, STEP, y)
    axis.legend(fontsize=8, frameon=False)


def tiers_of(record: Record, is_measured: bool) -> list[int]:
    return _numbered(record, "tiers", "tier_activity", ACTIVE) if is_measured else list(record.numbered(ACTIVITY))


def tier_activity(record: Record, tier: int, is_measured: bool) -> float | None:
    """Mean share of a tier's latents that are active on a token: as measured, or as training last logged it."""
    if is_measured:
        return record.metric("tiers", f"tier_activity.{ACTIVE}{tier}")
    return record.last(f"{ACTIVITY}{tier}")


def draw_tiers(records: Sequence[Record]) -> Figure | None:
    """After training: of the SAEs measured on the test split or, without any, of all in the last logged batch."""
    is_measured = any(tier_activity(record, 1, True) is not None for record in records)
    shown = [record for record in records if tier_activity(record, 1, is_measured) is not None]
    if not shown:
        return None
    tiers = sorted({tier for record in shown for tier in tiers_of(record, is_measured)})
    found = {tier: [tier_activity(record, tier, is_measured) for record in shown] for tier in tiers}
    parts = {f"tier {tier}": values for tier, values in found.items() if any(value is not None for value in values)}
    drawn = dict(islice(parts.items(), MOST_TIERS))
    figure, (axis,) = new_figure(1, width=max(5.0, 1.0 + 0.9 * len(shown)), height=3.6)
    draw_parts(axis, [f"{r.name}\n(no tiers)" if has_no_tiers(r) else r.name for r in shown], drawn, 100)
    figure.suptitle(first_of("Activity of tiers", len(drawn), len(parts), "tiers"), fontsize=12, color=INK)
    text = "test split" if is_measured else "last logged batch"
    instead = f"no tiers: {EQUAL_SHARES} of its latents instead" if any(map(has_no_tiers, shown)) else ""
    caption(axis, "", instead, f"% of the tier's latents active on a token\n({text})")
    return figure


def has_no_tiers(record: Record) -> bool:
    """Whether the evaluation `tiers` took equal shares of its latents instead."""
    return record.unstructured("tiers").get("tiers") == EQUAL_SHARES


def draw_parts(axis: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float | None]], factor: float) -> None:
    """Upright bars side by side: a group for each SAE, a bar for each part."""
    width = 0.8 / max(len(parts), 1)
    for place, ((part, values), colour) in enumerate(zip(parts.items(), shades(len(parts)), strict=True)):
        at = [i + (place - (len(parts) - 1) / 2) * width for i, value in enumerate(values) if value is not None]
        heights = [factor * value for value in values if value is not None]
        bars = axis.bar(at, heights, width=0.92 * width, color=colour, label=part)
        if len(parts) * len(names) <= MOST_LABELLED:
            axis.bar_label(bars, [f"{height:.2g}" for height in heights], padding=2, fontsize=7, color=INK)
    is_crowded = len(names) > 4 or max(len(line) for name in names for line in name.split("\n")) > 12
    turned = {"rotation": 35, "ha": "right"} if is_crowded else {}
    axis.set_xticks(range(len(names)), names, fontsize=8, parse_math=False, **turned)
    axis.grid(visible=False, axis="x")
    axis.legend(fontsize=8, frameon=False, ncols=min(len(parts), 4), loc="lower center", bbox_to_anchor=(0.5, 1.0))


PLOTS = {
    "layer_contribution": draw_contribution,
    "mixing_weights": draw_mixing,
    "tier_activity_comparison": draw_tiers,
}
