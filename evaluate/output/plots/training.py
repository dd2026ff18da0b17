"""Training: its settings, losses and tiers over its course, and how far it got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from ....cache_schema.strict_json import StrictError, from_json
from ....train.engine.adam import Optim
from ..figures.panels import Bars, Lines, draw_panels, series_of
from ..figures.records import Record

PENALTIES = ("weight/l1", "weight/lp", "weight/l0", "weight/gate_l1")
SCALES = ("short", "medium", "long")
TIERS = (1, 2, 3)


def temporal_loss(record: Record) -> tuple[list[float], list[float]]:
    """The weighted sum over scales, as it enters the total."""
    steps: dict[float, float] = {}
    for scale in SCALES:
        weights = dict(zip(*record.series(f"weight/temporal_{scale}"), strict=True))
        for step, value in zip(*record.series(f"loss/temporal_{scale}"), strict=True):
            steps[step] = steps.get(step, 0.0) + weights.get(step, 1.0) * value
    return sorted(steps), [steps[step] for step in sorted(steps)]


def peak_rate(record: Record) -> float | None:
    """The first logged learning rate over the schedule's share there: a short run may log none at the peak."""
    steps, rates = record.series("lr")
    settings, total_steps = record.settings.get("optim"), record.asked.get("total_steps")
    if not rates or settings is None or total_steps is None:
        return max(rates, default=None)
    try:
        share = replace(from_json(Optim, settings), lr=1.0).schedule()
    except StrictError:  # for example the settings of a later version
        return max(rates)
    return rates[0] / share(int(steps[0]), total_steps)


HYPERPARAMETERS = (
    Bars("Learning rate", "peak of its schedule", peak_rate, "{:.2e}"),
    Bars("Sparsity penalty", "coefficient", lambda r: r.setting("penalty")),
    Bars("Sparsity target", "active latents per token", lambda r: r.asked_l0),
    Lines("Learning rate over training", "learning rate", series_of("lr")),
    Lines("Sparsity penalty over training", "coefficient", series_of(PENALTIES)),
)

METRICS = (
    Lines("Reconstruction loss", "unexplained variance; nested: of all sizes", series_of("loss/reconstruction")),
    Lines(
        "Sparsity loss",
        "before its weight; jumprelu: from target",
        series_of(("loss/l1", "loss/l0", "loss/sparsity")),
    ),
    Lines("Total loss", "weighted sum of all terms", series_of("loss")),
    *(
        Lines(f"Tier {tier} activity", "% of its latents active on a token", series_of(f"tiers/activity_{tier}", 100))
        for tier in TIERS
    ),
    Lines("Guidance loss", "mean, before its weight", series_of("loss/guidance")),
    Lines("Consistency loss", "mean, before its weight", series_of("loss/consistency")),
    Lines("Composition loss", "mean, before its weight", series_of("loss/composition")),
    *(
        Lines(f"Composition of tier {tier}", "R² by the tier below", series_of(f"composition/r2_{tier}"), (-0.03, 1.03))
        for tier in TIERS[1:]
    ),
    Lines("Moves between tiers", "latents moved so far", series_of("tiers/moves")),
    Lines("Temporal consistency loss", "weighted sum over scales", temporal_loss),
    Lines("Activation variance", "mean over latents", series_of("temporal/activation_variance")),
    Bars(
        "Final reconstruction",
        "explained variance, held-out text",
        lambda r: r.outcome.get("explained_variance"),
        floor=-1,
    ),
)

LOSS = Bars("Final training loss", "weighted sum of all terms", lambda r: r.last("loss"), may_be_log=True)
PROGRESS = (
    Bars("Training steps completed", "steps", lambda r: None if r.steps is None else float(r.steps), "{:,.0f}"),
    LOSS,
    Lines("Mask coefficient", "0 no mask, 1 full mask", series_of("mask/coefficient"), (-0.03, 1.03)),
    Lines("Specialisation retention", "% of activation inside its range", series_of("mask/retention", 100), (0, 103)),
    Lines("Adapter gate", "mean gate", series_of("adapter/gate")),
)


def draw_progress(records: Sequence[Record]) -> Figure | None:
    """The losses of different variants have different terms, and are not set side by side."""
    seen = [record for record in records if record.log or record.steps is not None]
    is_one = len({record.variant for record in seen}) == 1
    panels = [panel for panel in PROGRESS if is_one or panel is not LOSS]
    return draw_panels(panels, seen, "Progress of training", records)


PLOTS = {
    "hyperparameters": lambda records: draw_panels(HYPERPARAMETERS, records, "Hyperparameters"),
    "training_metrics": lambda records: draw_panels(METRICS, records, "Training"),
    "training_progression": draw_progress,
}
