"""Plots: each is drawn where its data are, none where they are not, and text is only ever text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from saemill.evaluate.output import plots
from saemill.evaluate.output.figures import records
from saemill.evaluate.output.figures.records import CURVE_POINTS, Record, read_log, read_records, thinned_log
from saemill.evaluate.output.figures.seeds import groups_of
from saemill.evaluate.output.figures.style import COLOURS, look, new_figure, shades, shown
from saemill.evaluate.output.plots import all_plots, make_plots, pareto
from saemill.train.disk.atomic_files import write_json
from saemill.train.run.run_folder import RunFolder

STEPS = 12
HOSTILE = "<script>alert(1)</script> $\\frac{1}{0}$ \u202e\u0000\u4e2d _x^y"
ALL = {
    "activation_patterns",
    "composition_patterns",
    "feature_analysis",
    "hyperparameters",
    "layer_contribution",
    "mixing_weights",
    "pareto",
    "tier_activity_comparison",
    "training_metrics",
    "training_progression",
    "transition_matrix",
}
NOTES = {
    "attention": ["mixing/weight_17", "mixing/weight_18", "mixing/temperature", "attention/contribution_17"],
    "tiered": ["tiers/activity_1", "tiers/activity_2", "tiers/activity_3", "loss/composition"],
    "positional": ["mask/coefficient", "mask/retention"],
    "temporal": ["temporal/activation_variance", "temporal/lifetime", "loss/temporal_short", "loss/temporal_long"],
}


def line(label: str, step: int) -> dict:
    fall = math.exp(-step / 5)
    values = {"loss": 0.2 + fall, "loss/reconstruction": 0.1 + fall, "loss/l1": 3 * fall, "l0": 40 * fall, "lr": 3e-4}
    return {"sae": label, "step": step, **values, **dict.fromkeys(NOTES.get(label, ()), 0.1 + fall / 2)}


def result(metrics: dict, unstructured: dict | None = None) -> dict:
    return {"eval_result_metrics": metrics, "eval_result_unstructured": unstructured or {}}


def documents(token: str = "the") -> dict[str, dict]:
    activity = {f"active_share_{tier}": 0.1 / tier for tier in (1, 2, 3)}
    contribution = {f"{name}_{layer}": 0.01 for name in ("share", "similarity_gain") for layer in (17, 18)}
    pattern = {"tokens": [token, "\n"], "latents": [3, 5], "activations": [[0.0, 1.0], [2.0, 0.0]]}
    context = {"activation": 2.0, "before": token, "token": token, "after": ""}
    examples = {"pattern": pattern, "latents": [{"latent": 3, "fired_share": 0.2, "contexts": [context]}]}
    made_of = [{"latent": part, "weight": 1.0 / (part + 1), "tokens": [token]} for part in range(3)]
    composed = [{"latent": 40 + n, "tier": 2, "r_squared": 0.5, "tokens": [token], "parts": made_of} for n in range(3)]
    moves = {"frequent_latents": [1, 2], "base_rates": [0.1, 0.0], "transitions": [[0.2, 0.0], [0.0, 0.3]]}
    return {
        "core": result({"sparsity": {"l0": 20.0}, "model_performance_preservation": {"ce_loss_score": 0.9}}),
        "tiers": result({"tier_activity": activity}, {"compositions": composed}),
        "attention": result({"contribution": contribution}),
        "temporal": result({}, {**moves, "lifetimes": [1.0, 2.0], "stabilities": [0.5, 3.0]}),
        "browser": result({}, examples),
    }


@pytest.fixture
def make_run(tmp_path):
    """A finished run with all that plots read, or part of it."""

    def make(name="run_1", labels=("standard", *NOTES), evaluated=True, logged=True, token="the") -> RunFolder:
        run = RunFolder(tmp_path / name)
        run.path.mkdir(parents=True)
        members = {label: {"variant": label, "config": {"k": 32, "penalty": 0.04}} for label in labels}
        run.write_config({"saes": members})
        outcome = {"l0": 30.0, "explained_variance": 0.7, "dead_share": 0.0}
        run.write_result({"steps": STEPS, "saes": dict.fromkeys(labels, outcome)})
        if logged:
            lines = [json.dumps(line(label, step)) for step in range(STEPS) for label in labels]
            run.metrics.write_text("\n".join([*lines, '{"sae": "standard", "st']))
        for label in labels if evaluated else ():
            for evaluation, document in documents(token).items():
                path = run.path / "evals" / evaluation / f"{label}_eval_results.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, document)
        return run

    return make


def test_the_folder_is_the_registry():
    assert set(all_plots()) == ALL


def test_runs_of_one_name_are_told_by_their_paths(make_run, tmp_path):
    records = read_records([make_run(f"{folder}/run_1", ["standard"]) for folder in "ab"], print)
    assert [record.name for record in records] == [f"{tmp_path}/{folder}/run_1/standard" for folder in "ab"]


def test_two_that_draw_the_same_at_once_do_not_take_each_others_files(tmp_path):
    class Overtaken(Figure):
        """While it is drawn, another process draws the same and is done first."""

        def savefig(self, *args, **options):
            super().savefig(*args, **options)
            plots.save(Figure(), tmp_path / "a.png")

    plots.save(Overtaken(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", sorted(ALL))
def test_no_panel_is_empty(make_run, name):
    """Whatever a run lacks, what is drawn has data in it, a title or a caption, and named axes."""
    for record in read_records([make_run()], print):
        figure = all_plots()[name]([record])
        if figure is None:
            continue
        for axis in panels_of(figure):
            assert axis.lines or axis.patches or axis.images or axis.collections, (record.name, axis.get_title())
            assert axis.get_xlabel() or axis.get_ylabel()
            assert axis.get_title() or figure.get_suptitle()


def panels_of(figure: Figure) -> list:
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def test_what_a_run_lacks_is_not_drawn(make_run, tmp_path):
    bare = make_plots(read_records([make_run(labels=("standard", "topk"), evaluated=False)], print), tmp_path / "plots")
    assert {path.stem for path in bare} == ALL - {
        "activation_patterns",
        "composition_patterns",
        "layer_contribution",
        "mixing_weights",
        "tier_activity_comparison",
        "transition_matrix",
    }
    unlogged = make_plots(
        read_records([make_run("run_2", ("standard", "topk"), evaluated=False, logged=False)], print),
        tmp_path / "plots",
    )
    assert {path.stem for path in unlogged} == {"hyperparameters", "pareto", "training_metrics", "training_progression"}
    assert not (tmp_path / "plots" / "feature_analysis.png").exists()  # of the run before: no longer true


def test_one_sae_by_itself_has_no_bars_and_no_points(make_run):
    """A bar or a point that nothing stands beside says no more than its number."""
    (record,) = read_records([make_run(labels=("standard",))], print)
    titles = [axis.get_title() for draw in all_plots().values() if (drawn := draw([record])) for axis in drawn.axes]
    assert "Total loss" in titles and "Learning rate over training" in titles
    assert not {"Learning rate", "Final reconstruction", "Training steps completed", "Residual"} & set(titles)


def test_the_learning_rate_of_a_run_too_short_to_log_its_peak_is_the_one_it_trained_with():
    """44 steps of which two are logged, the first in the warm-up of four: the console said 0.0096."""
    log = [{"step": 0, "lr": 0.00192}, {"step": 43, "lr": 0.0011}]
    optim = {"lr": None, "warmup_steps": 1000, "warmup_max_fraction": 0.1, "decay_fraction": 0.2}
    short = Record("a", "run", "a", settings={"optim": optim}, log=log, asked={"total_steps": 44})
    others = {"b": {}, "c": {"optim": optim | {"later": 1}}, "d": {"optim": {"lr": -1.0}}}
    figure = all_plots()["hyperparameters"]([short, *(replace(short, name=n, settings=s) for n, s in others.items())])
    assert figure is not None
    (axis,) = (axis for axis in figure.axes if axis.get_title() == "Learning rate")
    as_logged = ["1.92e-03"] * 3  # nothing is known of their schedules, or nothing that this version reads
    assert [text.get_text() for text in axis.texts] == ["9.60e-03", *as_logged]


@pytest.mark.parametrize("name", ["training_metrics", "layer_contribution", "mixing_weights"])
@pytest.mark.parametrize(("points", "mark"), [(1, "o"), (2, "o"), (50, "None")])
def test_a_line_of_few_points_shows_them(name, points, mark):
    """Of one there is no line at all, and of two a straight one that passed for a curve."""
    values = dict.fromkeys(("loss", "attention/contribution_17", "mixing/weight_17"), 0.5)
    log = [{"step": step, **values} for step in range(points)]
    figure = all_plots()[name]([Record("a", "run", "a", log=log)])
    assert figure is not None and {line.get_marker() for axis in figure.axes for line in axis.lines} == {mark}


@pytest.mark.parametrize(("variants", "is_drawn"), [(["topk", "topk"], True), (["topk", "matryoshka"], False)])
def test_losses_of_several_variants_are_not_set_side_by_side(variants, is_drawn):
    """A sum over nested sizes and a single loss: 2.04 against 0.18 says nothing."""
    log = [{"step": 0, "loss": 1.0}]
    seen = [Record(f"sae_{n}", "run", "", variant, log=log, steps=1) for n, variant in enumerate(variants)]
    figure = all_plots()["training_progression"](seen)
    assert ("Final training loss" in {axis.get_title() for axis in figure.axes}) == is_drawn


def test_ticks_have_their_numbers_in_full():
    """16.001 is not 1e-3 beside an axis that says +1.6e1."""
    figure, (axis,) = new_figure(1)
    axis.plot([0, 1], [16.001, 16.002])
    figure.canvas.draw()
    assert axis.yaxis.get_offset_text().get_text() == ""
    assert "16.001" in [tick.get_text() for tick in axis.get_yticklabels()]


def test_nothing_to_draw_draws_nothing(tmp_path):
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    assert make_plots(read_records([empty], print), tmp_path / "plots") == []


def test_panels_are_those_that_the_sae_has_data_for(make_run):
    records = {record.name: record for record in read_records([make_run()], print)}
    draw = all_plots()["training_metrics"]
    tiered, temporal = draw([records["tiered"]]), draw([records["temporal"]])
    assert tiered is not None and temporal is not None
    assert {"Tier 1 activity", "Tier 3 activity", "Composition loss"} <= {axis.get_title() for axis in tiered.axes}
    assert {"Temporal consistency loss", "Activation variance"} <= {axis.get_title() for axis in temporal.axes}
    assert "Tier 1 activity" not in {axis.get_title() for axis in temporal.axes}


def test_of_a_long_log_few_lines_are_parsed(make_run, monkeypatch):
    """A fleet of 64 has a million lines, and a page of a run that trains is made again and again. Each SAE has its
    first line, its last, and as many between as a chart shows, also where it diverged or a label is hard to tell."""
    labels, steps, parsed = ["topk", "step", 'a"step"'], 1001, []
    run = make_run(labels=("topk",), logged=False)
    lines = [json.dumps(line(label, step)) for step in range(steps) for label in labels if label != "step" or step < 9]
    other = '{"step": 1, "sae": "topk", "loss": 7.0}'
    run.metrics.write_text("\n".join([*lines[:9], other, *lines[9:], '{"sae": "topk", "st']))
    loads = json.loads
    monkeypatch.setattr(records.json, "loads", lambda text: parsed.append(text) or loads(text))
    found = thinned_log(run.metrics)
    assert len(parsed) == sum(map(len, found.values())) < 3 * (CURVE_POINTS + 2)
    assert found['a"step"'] == [line('a"step"', step) for step in (*range(0, 1000, 6), 1000)]
    assert found["step"] == [line("step", step) for step in range(9)]
    first, *rest = found["topk"]
    assert first == line("topk", 0) and rest.pop(0) == json.loads(other)
    assert rest == [line("topk", step) for step in (*range(6, 1000, 6), 1000)]
    assert len(list(read_log(run.metrics))) == len(lines) + 1


def test_several_runs_share_a_figure_and_names_say_which(make_run):
    records = read_records([make_run("run_1", ("topk",)), make_run("run_2", ("topk",))], print)
    assert [record.name for record in records] == ["run_1/topk", "run_2/topk"]
    figure = all_plots()["training_metrics"](records)
    assert figure is not None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["run_1/topk", "run_2/topk"]
    assert all(len(axis.lines) >= 2 for axis in figure.axes if axis.get_title() == "Total loss")


def test_an_sae_has_one_colour_throughout(make_run):
    records = read_records([make_run()], print)
    figure = all_plots()["training_metrics"](records)
    assert figure is not None
    for axis in figure.axes:
        if axis.get_title() == "Tier 1 activity":
            (line_drawn,) = axis.lines
            assert line_drawn.get_color() == look([r.name for r in records].index("tiered")).colour


@pytest.mark.parametrize("name", ["pareto", "training_metrics", "mixing_weights"])
def test_seeds_of_one_sae_look_alike_and_have_one_place_in_the_legend(name):
    """Nine SAEs of a grid over k and the seed had nine looks."""
    log = [{"step": 0, "loss": 1.0, "mixing/weight_17": 1.0, "mixing/temperature": 1.0}]
    outcome = {"l0": 32.0, "explained_variance": 0.7}
    seen = [
        Record(label := f"topk_k{k}_seed{seed}", "run", label, "topk", {"k": k, "seed": seed}, log, outcome)
        for k in (16, 32)
        for seed in range(3)
    ]
    figure = all_plots()[name](seen)
    (axis,) = (one for one in figure.axes if one.get_title() in ("Residual", "Total loss", "Temperature"))
    assert [line.get_color() for line in axis.lines] == 3 * [look(0).colour] + 3 * [look(1).colour]
    (legend,) = [*figure.legends, axis.get_legend()][:1]
    assert [text.get_text() for text in legend.get_texts()] == ["topk_k16 (3 seeds)", "topk_k32 (3 seeds)"]
    assert [handle.get_color() for handle in legend.get_lines()] == [look(0).colour, look(1).colour]


def test_saes_of_several_runs_are_no_seeds_of_one():
    """Whose names differ as if they were; those within a run are still one."""
    places = [("exp_seed0_b", "topk_seed0"), ("exp_seed0_b", "topk_seed1"), ("exp_seed1_b", "topk_seed0")]
    groups = groups_of([Record(f"{run}/{label}", run, label) for run, label in places])
    assert [*groups.values()] == ["exp_seed0_b/topk", "exp_seed0_b/topk", "exp_seed1_b/topk"]


@pytest.mark.parametrize("saes", [1, 4, 5, 12, 30])
def test_bars_of_many_saes_have_a_row_each_and_make_no_figure_too_wide_to_read(saes):
    """Three panels of 12 SAEs were 4,320 pixels wide, their text 2 pixels high on a page."""
    measured = result({"contribution": {"share_17": 0.1, "similarity_gain_17": 0.1}})
    log = [{"step": step, "attention/contribution_17": 1.0} for step in (0, 1)]
    seen = [Record(f"sae_{n}", "run", "", documents={"attention": measured}, log=log) for n in range(saes)]
    figure = all_plots()["layer_contribution"](seen)
    assert figure is not None and figure.get_figwidth() <= 15
    figure.draw_without_rendering()
    bars, lines = figure.axes[0].get_position(), figure.axes[2].get_position()
    assert (bars.width > 1.5 * lines.width) == (saes > 4)


@pytest.mark.parametrize(
    ("name", "prefix"), [("layer_contribution", "attention/contribution_"), ("mixing_weights", "mixing/weight_")]
)
def test_a_layer_looks_alike_in_every_panel(name, prefix):
    """Whichever other layers an SAE logged."""
    logs = ([17, 18, 19], [18], [19, 18])
    rows = [[{"step": step, **{f"{prefix}{layer}": 0.1 for layer in layers}} for step in (0, 1)] for layers in logs]
    figure = all_plots()[name]([Record(f"sae_{n}", "run", "", log=log) for n, log in enumerate(rows)])
    assert figure is not None
    lines = [line for axis in figure.axes for line in axis.lines]
    looks = {
        layer: {(one.get_color(), one.get_ls()) for one in lines if one.get_label() == layer}
        for layer in ("layer 17", "layer 18", "layer 19")
    }
    assert [len(found) for found in looks.values()] == [1, 1, 1] and len(set.union(*looks.values())) == 3


def test_thirty_names_leave_the_panels_their_height(tmp_path):
    """Their legend took all of a figure of one panel."""
    outcomes = [{"l0": 32.0 + n, "explained_variance": 0.7} for n in range(30)]
    records = [Record(f"guided_strongly_k{n}", "run", "", outcome=one) for n, one in enumerate(outcomes)]
    figure = pareto.draw(records)
    plots.save(figure, tmp_path / "pareto.png")
    assert all(axis.get_position().height * figure.get_figheight() > 1.5 for axis in figure.axes)


def test_labels_of_square_panels_lie_beside_each_other_and_inside(tmp_path):
    """Beside a colour bar, titles of the second row lay on the first row's labels, and the last were cut."""
    size = 24
    moves = {"frequent_latents": [*range(100, 100 + size)], "base_rates": [0.1] * size}
    temporal = result({}, moves | {"transitions": [[0.1] * size] * size})
    seen = [Record(f"sae_{n}", "run", "", documents={"temporal": temporal}) for n in range(5)]
    figure = all_plots()["transition_matrix"](seen)
    plots.save(figure, tmp_path / "transition_matrix.png")
    boxes = [axis.get_tightbbox() for axis in panels_of(figure)]
    assert not [(one, other) for one, other in combinations(boxes, 2) if one.overlaps(other)]
    assert all(box.y0 >= 0 and box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_quality_against_sparsity_mixes_no_splits():
    """Where core measured some of the SAEs, training's own numbers of the others are of the validation split."""
    outcome = {"l0": 32.0, "explained_variance": 0.7}
    measured = documents() | {"core": documents()["core"] | {"saemill_metrics": {"explained_variance": 0.8}}}
    records = [Record(f"sae_{n}", "run", "", outcome=outcome, documents=measured if n else {}) for n in range(3)]
    for drawn, looks in ((records, [1, 2]), ([replace(one, documents={}) for one in records], [0, 1, 2])):
        axis = pareto.draw(drawn).axes[0]
        assert [line.get_color() for line in axis.lines] == [look(place).colour for place in looks]
    no_l0 = {"core": documents()["core"] | {"eval_result_metrics": {}, "saemill_metrics": {"explained_variance": 0.8}}}
    half = replace(records[0], documents=no_l0)  # its point would be half of training's
    assert len(pareto.draw([half, *records[1:]]).axes[0].lines) == 2


def test_quality_against_sparsity_has_the_intervals_that_core_measured():
    """Without them differences within the noise look like findings."""
    ours = {"explained_variance": 0.8, "confidence_95": {"explained_variance": [0.7, 0.85], "ce_loss_score": None}}
    core = documents()["core"] | {"saemill_metrics": ours}
    figure = pareto.draw([Record(f"sae_{n}", "run", "", documents={"core": core}) for n in range(2)])
    residual, loss = figure.axes
    assert [tuple(line.get_ydata()) for line in residual.lines] == 2 * [(0.7, 0.85), (0.8,)]
    assert [tuple(line.get_ydata()) for line in loss.lines] == 2 * [(0.9,)]
    assert figure.get_suptitle() == "Quality against sparsity\n95 % intervals over documents"


@pytest.mark.parametrize("panels", [1, 3])
def test_quality_against_sparsity_says_which_settings_differ(panels):
    """Of results on two stores, say; and none of that where they are of one."""
    numbers = {"sparsity": {"l0": 20.0}, "model_performance_preservation": {"ce_loss_score": 0.9}}
    core = result(numbers | ({"model_behavior_preservation": {"kl_div_score": 0.9}} if panels == 3 else {}))
    core["saemill_metrics"] = {"explained_variance": 0.8} if panels == 3 else {}

    def records(*stores):
        settings = [{"cache_id": store, "config": {"$\\frac$": store}} for store in stores]
        return [
            Record(f"{n}", "", "", documents={"core": core | {"saemill": {"settings": s}}})
            for n, s in enumerate(settings)
        ]

    figure = pareto.draw(records("a", "b"))
    assert len(figure.axes) == panels
    assert "core's results differ in cache_id" in " ".join(figure.get_suptitle().split())
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert pareto.draw(records("a", "a")).get_suptitle() == "Quality against sparsity"


def test_activity_of_tiers_mixes_no_texts(make_run):
    """Where some SAEs were measured, the last logged batch of others is other text."""
    records = read_records([make_run(labels=("tiered", "topk"))], print)
    bare = replace(records[0], name="logged", documents={})
    draw = all_plots()["tier_activity_comparison"]
    for drawn, names, text in ((records, ["tiered", "topk"], "test split"), ([bare], ["logged"], "last logged batch")):
        axis = draw([*drawn, bare]).axes[0] if drawn == records else draw(drawn).axes[0]
        assert [label.get_text() for label in axis.get_xticklabels()] == names and text in axis.get_ylabel()


@pytest.mark.parametrize(
    ("name", "most"), [("activation_patterns", 6), ("composition_patterns", 4), ("transition_matrix", 9)]
)
def test_a_figure_of_some_of_the_saes_says_so(name, most):
    seen = [Record(f"sae_{n}", "run", "", documents=documents()) for n in range(most + 1)]
    draw = all_plots()[name]
    figure = draw(seen)
    assert len(panels_of(figure)) == most
    assert figure.get_suptitle().endswith(f" (first {most} of {most + 1} SAEs)")
    assert "first" not in draw(seen[:most]).get_suptitle()


def composed(name: str, weight: float, source: str) -> Record:
    made = [{"latent": 9, "tier": 2, "r_squared": 0.5, "tokens": [], "parts": [{"latent": 1, "weight": weight}]}]
    measured = result({"tier_activity": {"active_share_1": 0.1}}, {"tiers": source, "compositions": made})
    return Record(name, "run", name, documents={"tiers": measured})


def test_weights_of_parts_are_alike_in_all_panels():
    """Each panel had a scale of its own: the SAE that was composed least was the darkest."""
    figure = all_plots()["composition_patterns"]([composed("a", 0.3, "saved"), composed("b", 0.8, "saved")])
    assert [axis.images[0].get_clim() for axis in panels_of(figure)] == [(0, 0.8), (0, 0.8)]
    assert len(figure.axes) == 3  # and says what they mean


def test_an_sae_without_tiers_is_not_shown_as_having_them():
    seen = [composed("tiered", 0.3, "saved"), composed("plain", 0.3, "equal shares")]
    titles = [axis.get_title() for axis in panels_of(all_plots()["composition_patterns"](seen))]
    assert titles == ["tiered", "plain (no tiers: equal shares of its latents instead)"]
    (axis,) = all_plots()["tier_activity_comparison"](seen).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["tiered", "plain\n(no tiers)"]
    assert axis.get_xlabel() == "no tiers: equal shares of its latents instead"
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {0.0}  # of two lines, neither of them long


@pytest.mark.parametrize("tiers", [8, 12])
@pytest.mark.parametrize("is_measured", [True, False])
def test_a_figure_of_some_of_the_tiers_says_so(tiers, is_measured):
    names = range(1, tiers + 1)
    measured = {"tiers": result({"tier_activity": {f"active_share_{n}": 0.1 for n in names}})}
    log = [{"step": 0, **{f"tiers/activity_{n}": 0.1 for n in names}}]
    figure = all_plots()["tier_activity_comparison"](
        [Record("a", "run", "a", documents=measured) if is_measured else Record("a", "run", "a", log=log)]
    )
    assert len(figure.axes[0].containers) == 8
    assert figure.get_suptitle() == "Activity of tiers" + (" (first 8 of 12 tiers)" if tiers == 12 else "")


def test_looks_differ_for_as_many_saes_as_anyone_compares():
    looks = [(look(place).colour, look(place).line) for place in range(4 * len(COLOURS))]
    assert len(set(looks)) == len(looks)
    assert len(set(shades(6))) == 6


def test_hostile_text_is_drawn_as_text(make_run, tmp_path):
    """A run with everything, beside another, has every plot, as PNG and SVG, whatever formulas do not parse, glyphs no
    font has and control characters stand in its names and tokens: warnings are errors here."""
    run = make_run(name="run_$x$", labels=("standard", *NOTES, "a$\\frac$b_c^d"), token=HOSTILE)
    other = make_run(name="a$\\frac{$b", labels=("attention", "tiered"))
    written = make_plots(read_records([run, other], print), tmp_path / "plots")
    assert {path.stem for path in written} == ALL
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert all(b"<svg" in path.with_suffix(".svg").read_bytes() for path in written)
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png", ".svg"}


def test_whitespace_shows_and_unknown_letters_are_dots():
    assert shown(" the") == "the"
    assert shown("\n") == "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}"
    assert shown("a\u4e2d") == "a\N{MIDDLE DOT}"
    assert shown("") == "\N{MIDDLE DOT}"


def test_tables_and_plots_show_one_explained_variance():
    """SAEBench's own is another quantity under the same name."""
    core = {"eval_result_metrics": {"reconstruction_quality": {"explained_variance": 0.9}}}
    record = Record("a", "run_1", "a", documents={"core": core | {"saemill_metrics": {"explained_variance": 0.8}}})
    assert record.held_out("explained_variance") == 0.8
    assert Record("a", "run_1", "a", outcome={"explained_variance": 0.7}).held_out("explained_variance") == 0.7


def test_a_number_that_really_is_minus_one_is_one():
    """As JSON has it: an absent one of ours is written as -1, SAEBench's as either."""
    metrics = {"specialisation": {"fidelity": -1.0, "retention": -1}}
    for ours, found in (({"saemill": {"label": "a"}}, -1.0), ({}, None)):
        document = json.loads(json.dumps({"eval_result_metrics": metrics, "own": {"share": -1}, **ours}))
        record = Record("a", "run_1", "a", documents={"position": document})
        assert record.metric("position", "specialisation.fidelity") == found
        assert record.metric("position", "specialisation.retention") is None
        assert record.metric("position", "own.share") == -1


def test_no_global_state_is_touched(make_run):
    before = dict(rcParams)
    records = read_records([make_run(labels=("standard", "temporal"))], print)
    assert all(all_plots()[name](records) is not None for name in ("training_metrics", "transition_matrix", "pareto"))
    assert dict(rcParams) == before


def test_a_log_that_is_being_written_is_read_up_to_its_last_line(make_run):
    (record,) = read_records([make_run(labels=("standard",))], print)
    assert len(record.log) == STEPS
    assert record.last("loss") == pytest.approx(line("standard", STEPS - 1)["loss"])
    assert record.last("nothing") is None
