"""Pictures from the command line: beside the run, of runs together, and never at the price of a number."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from saemill.evaluate.cli import main
from saemill.evaluate.output import plots
from saemill.evaluate.output.pictures import joint_name

QUICK = ("--evals", "temporal", "--set", "temporal.windows=4", "--device", "cpu")


@pytest.fixture
def invoke(builder):
    def run(*words: str):
        return CliRunner().invoke(main, [*words, *QUICK, "--runs", str(builder.root / "runs")], catch_exceptions=False)

    return run


def test_a_run_gets_plots_and_a_page(world, builder, invoke):
    run = builder.run(world, "run_1", {"a": builder.make_sae(k=None)})
    assert invoke("run_1").exit_code == 0
    assert {"feature_analysis.png", "transition_matrix.png"} <= {path.name for path in (run / "plots").iterdir()}
    assert "data:image/png" in (run / "report.html").read_text()


def test_results_that_were_kept_are_drawn_again(world, builder, invoke):
    run = builder.run(world, "run_1", {"a": builder.make_sae(k=None)})
    assert invoke("run_1", "--no-plots").exit_code == 0
    ended = invoke("run_1", "--resume")
    assert "kept" in ended.output
    assert (run / "plots" / "transition_matrix.png").is_file() and (run / "report.html").is_file()


def test_none_are_drawn_where_none_are_wanted(world, builder, invoke):
    run = builder.run(world, "run_1", {"a": builder.make_sae()})
    assert invoke("run_1", "--no-plots").exit_code == 0
    assert not (run / "plots").exists() and not (run / "report.html").exists()


def test_compared_runs_share_their_figures(world, builder, invoke):
    for name in ("run_1", "run_2"):
        builder.run(world, name, {"a": builder.make_sae()})
    assert invoke("run_1", "run_2", "--compare").exit_code == 0
    together = builder.root / "runs" / "compare" / "run_1+run_2"
    assert (together / "transition_matrix.png").is_file()


def test_a_page_of_compared_runs_has_what_was_compared_and_nothing_else(world, builder, invoke):
    """Of other SAEs and evaluations that lie there nobody has looked whether they are of the same settings."""
    for name in ("run_1", "run_2"):
        builder.run(world, name, {"a": builder.make_sae(), "b": builder.make_sae(seed=1)})
    assert invoke("run_1", "--no-plots").exit_code == 0
    other = builder.root / "runs/run_1/evals/attention/a_eval_results.json"
    other.parent.mkdir()
    other.write_text('{"eval_result_metrics": {"fidelity": {"score": 0.5}}}')
    assert invoke("run_1/a", "run_2/a", "--compare").exit_code == 0
    page = (builder.root / "runs/compare/run_1+run_2/report.html").read_text()
    assert "run_1/a" in page and "run_2/a" in page and "TCS short" in page
    assert "run_1/b" not in page and "attention fidelity" not in page


def test_saes_without_a_run_are_compared_where_they_lie(world, builder, invoke, monkeypatch):
    monkeypatch.chdir(builder.root)
    for name in ("one", "two"):
        builder.save(builder.root / name, builder.make_sae())
    assert invoke("one", "two", "--compare", "--cache", world.store).exit_code == 0
    page = (builder.root / "compare/one+two/report.html").read_text()
    assert "one" in page and "two" in page and "TCS short" in page


def test_the_folder_of_many_runs_has_a_name_that_a_file_system_takes(tmp_path):
    many = [f"run_{number:03d}_ü" for number in range(60)]
    name, other = joint_name(many), joint_name([*many[:-1], "run_1"])
    (tmp_path / name).mkdir()
    assert name != other and name.startswith("run_000_ü+run_001_ü") and len(name.encode()) <= 255
    assert joint_name(many[:2]) == "run_000_ü+run_001_ü"


def test_a_plot_that_fails_costs_no_number(world, builder, invoke, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("no picture today")

    monkeypatch.setattr(plots, "make_plots", fail)
    run = builder.run(world, "run_1", {"a": builder.make_sae()})
    ended = invoke("run_1")
    assert ended.exit_code == 0
    assert "no picture today" in ended.output
    assert (run / "evals" / "temporal" / "a_eval_results.json").is_file()
