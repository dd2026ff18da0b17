"""Runs by name: found by their files, trained as written, bowing to the store and to the command line."""

import json

import pytest

from saemill.train import study_recipes
from saemill.train.config.parse_settings import parse_grid, parse_settings
from saemill.train.config.recipe import Recipe, Sae, find_recipes, runs_of, studies
from saemill.train.config.run_config import CourseConfig, DataConfig, RunRequest
from saemill.train.errors import ConfigInvalid

PROBE = """
from saemill.train.config.recipe import Recipe, Sae

RUNS = (
    Recipe("run_0", "one", (Sae("plain", "standard"),), {"layer": 3, "course.epochs": 1}),
    Recipe(
        "run_1",
        "two",
        (Sae("few", "topk", {"k": 2}), Sae("more", "topk", {"k": 4})),
        {"layer": 3, "width": 24, "data.batch_tokens": 64, "course.tokens": 640},
    ),
)
"""
QUICK = ["--device", "cpu", "--set", "data.pool_tokens=600", "--set", "data.batch_tokens=64"]
TWO = Recipe("two", "", (Sae("few", "topk", {"k": 2}), Sae("dense", "standard")), {"k": 90, "width": 700, "layer": 3})


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A study called `probe`, made by writing a file."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/probe.py").write_text(PROBE)
    monkeypatch.setattr(study_recipes, "__path__", [*study_recipes.__path__, str(tmp_path / "studies")])


def members(recipe, words=(), grid=(), limits=None):
    asked = RunRequest.of_recipe(recipe, parse_settings(words), parse_grid(grid)).members(lambda _: limits or {})
    return {member.label: member.config for member in asked}


def test_an_saes_own_settings_stand_before_the_runs_which_reach_all_that_have_them():
    found = members(TWO)
    assert found["few"].k == 2 and found["few"].width == found["dense"].width == 700
    assert not hasattr(found["dense"], "k")


def test_recipes_bow_to_the_store_and_to_the_command_line_which_bows_to_nobody():
    limits = {"k": 1, "width": 256}
    found = members(TWO, limits=limits)
    assert (found["few"].k, found["few"].width, found["dense"].width) == (1, 256, 256)
    found = members(TWO, ["k=5", "standard.width=999"], limits=limits)
    assert (found["few"].k, found["few"].width, found["dense"].width) == (5, 256, 999)


@pytest.mark.parametrize("word", ["alpha=0.3", "attention.alpha=0.3"])
def test_a_setting_that_makes_a_control_of_a_recipe_its_treatment_is_refused(word):
    (recipe,) = find_recipes("attention/run_1")
    for words, grid in (([word], ()), ([], [f"{word},0.5"])):
        with pytest.raises(ConfigInvalid, match="base.* and guided.* differ in alpha in the recipe, and would become"):
            members(recipe, words, grid)


def test_a_grid_repeats_every_sae():
    assert list(members(TWO, grid=["seed=0,1"])) == ["few_seed0", "few_seed1", "dense_seed0", "dense_seed1"]


def test_a_grid_of_a_setting_that_some_variants_lack_repeats_the_others():
    assert list(members(TWO, grid=["k=2,4"])) == ["few_k2", "few_k4", "dense"]


def test_the_course_and_the_stream_are_the_recipes_unless_told_otherwise():
    recipe = Recipe("r", "", TWO.saes, {"course.tokens": 7, "course.epochs": 2, "data.seed": 3})
    request = RunRequest.of_recipe(recipe, parse_settings(["course.tokens=9"]))
    course = request.course(CourseConfig())
    assert (course.tokens, course.epochs, request.data(DataConfig()).seed) == (9, 2, 3)


def test_a_run_is_trained_as_written_in_a_folder_of_its_name(probe, big, sae_train, tmp_path):
    for _ in range(2):
        sae_train("--recipe", "probe/run_1", *QUICK, "--cache", big["path"])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"run_1", "run_1_2"}
    config = json.loads((tmp_path / "runs/run_1_2/config.json").read_text())
    assert config["recipe"] == "probe/run_1" and config["total_steps"] == 10
    assert {label: sae["config"]["k"] for label, sae in config["saes"].items()} == {"few": 2, "more": 4}
    assert {sae["config"]["width"] for sae in config["saes"].values()} == {24}


def test_a_grid_takes_the_place_of_what_the_recipe_says(probe, big, sae_train, tmp_path):
    sae_train("--recipe", "probe/run_1", *QUICK, "--cache", big["path"], "--tokens", 128, "--grid", "width=8,16")
    saes = json.loads((tmp_path / "runs/run_1/result.json").read_text())["saes"]
    widths = {"few_width8": 8, "few_width16": 16, "more_width8": 8, "more_width16": 16}
    assert {label: sae["width"] for label, sae in saes.items()} == widths


def test_a_study_is_all_its_runs_and_options_reach_them(probe, big, sae_train, tmp_path):
    result = sae_train("--recipe", "probe", *QUICK, "--cache", big["path"], "--tokens", 320, "--width", 16)
    for run in ("run_0", "run_1"):
        outcome = json.loads((tmp_path / f"runs/{run}/result.json").read_text())
        assert outcome["steps"] == 5 and {sae["width"] for sae in outcome["saes"].values()} == {16}
        assert f"next: sae-eval {tmp_path / 'runs' / run}" in result.output


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "prob"], "unknown study 'prob' (did you mean 'probe'"),
        (["--recipe", "probe/run_7"], "unknown run 'run_7' of probe (did you mean"),
        (["--recipe", "probe", "--name", "mine"], "the study probe has 2: leave it out"),
        (["--recipe", "probe/run_1", "--variant", "topk"], "leave out --variant"),
        (["--recipe", "probe/run_1", "--resume", "run_1"], "leave out --recipe"),
        (["--recipe", "probe/run_1", "--set", "kk=3"], "did you mean 'k'"),
    ],
)
def test_mistakes_are_named(probe, big, sae_train, tmp_path, words, said):
    assert said in sae_train(*words, "--cache", big["path"], code=1).output
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("study", studies())
def test_every_recipe_can_be_asked_for(study):
    """Each SAE has a setting for all that its recipe says, and a label of its own that a folder can have."""
    for recipe in runs_of(study):
        assert recipe.about and recipe.name.startswith(("run_", "headline", "decisive"))
        labels = [sae.label for sae in recipe.saes]
        assert len(set(labels)) == len(labels) and not any(set(label) & set("/ ") for label in labels)
        found = members(recipe)
        assert list(found) == labels
        for key in recipe.settings:
            assert key.split(".")[0] in ("data", "course") or any(hasattr(c, key.split(".")[0]) for c in found.values())
        RunRequest.of_recipe(recipe).course(CourseConfig())
        RunRequest.of_recipe(recipe).data(DataConfig())
        for config in found.values():
            config.needs()


def test_runs_have_distinct_names():
    for study in studies():
        names = [recipe.name for recipe in runs_of(study)]
        assert len(set(names)) == len(names) > 0
    with pytest.raises(ConfigInvalid):
        find_recipes("nothing/run_1")
