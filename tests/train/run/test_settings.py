"""Words to values, values to records."""

import dataclasses

import pytest

from saemill.cache_schema.strict_json import flatten, to_json
from saemill.train.config.parse_settings import parse_grid, parse_settings, parse_value, with_settings
from saemill.train.config.recipe import Sae
from saemill.train.config.run_config import (
    NAMES_ELSEWHERE,
    CourseConfig,
    DataConfig,
    RunConfig,
    RunRequest,
    read_run_config,
)
from saemill.train.engine.adam import Optim
from saemill.train.errors import ConfigInvalid
from saemill.train.kit import variant_registry
from saemill.train.kit.check_variant_settings import topk_optim


@pytest.mark.parametrize(
    "text, value",
    [
        ("50M", 50_000_000),
        ("1.5k", 1500),
        ("4.1M", 4_100_000),
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ("None", None),
        ("null", None),
        ("17,18", [17, 18]),
        ("[17, 18]", [17, 18]),
        ("bfloat16", "bfloat16"),
        ('"8"', "8"),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "9" * 400 + "M", "1e400", "[" * 100_000], ids=len)
def test_what_no_number_can_hold_is_a_word(text):
    """Which the setting it is given to refuses."""
    assert parse_value(text) == text


def test_settings_of_other_libraries_are_named_as_they_are_here():
    shared = {f"data.{key}" for key in to_json(DataConfig())} | {f"course.{key}" for key in to_json(CourseConfig())}
    own = {key for name in ("topk", "standard") for key in flatten(to_json(variant_registry.config_type(name)()))}
    assert set(NAMES_ELSEWHERE.values()) <= shared | own


def test_a_grid_is_every_combination():
    points = parse_grid(["k=16,32", "seed=0,1,2", "layers=[1,2],[3]"])
    assert len(points) == 2 * 3 * 2
    assert points[-1] == {"k": 32, "seed": 2, "layers": [3]}
    assert parse_grid([]) == [{}]


def test_settings_are_typed_and_every_mistake_is_told():
    changed = with_settings(CourseConfig(), {"tokens": 5, "trackers": ["wandb"]}, "course")
    assert changed == CourseConfig(tokens=5, trackers=("wandb",))
    with pytest.raises(ConfigInvalid, match=r"unknown setting 'token'.*did you mean 'tokens'.*; unknown setting 'x'"):
        with_settings(CourseConfig(), {"token": 5, "x": 1}, "course")
    with pytest.raises(ConfigInvalid, match="tokens: expected a whole number"):
        with_settings(CourseConfig(), {"tokens": 1.5}, "course")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trackers=wandb", ("wandb",)),
        ("trackers=wandb,tensorboard", ("wandb", "tensorboard")),
        ('trackers=["wandb"]', ("wandb",)),
        ("trackers=", ()),
    ],
)
def test_a_list_is_written_with_commas_and_one_item_is_a_list(word, expected):
    assert with_settings(CourseConfig(), parse_settings([word]), "course").trackers == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--k", "2", "--set", "k=3"],
        ["--lr", "1e-3", "--set", "optim.lr=1e-4"],
        ["--set", "lr=1e-3", "--set", "optim.lr=1e-4"],
    ],
)
def test_of_two_values_of_a_setting_by_two_names_none_is_dropped(big, sae_train, words):
    words = ["--variant", "topk", "--cache", big["path"], "--dry-run", *words]
    assert "expected one value of " in sae_train(*words, code=1).stderr


def test_lists_are_lists_wherever_a_variant_or_a_grid_has_them():
    assert members(["layers=18"], "crosscoder")[0].config.layers == (18,)
    assert members(["layers=18,19"], "crosscoder")[0].config.layers == (18, 19)
    (tiered,) = members(["curriculum=0.5", "boundaries=None"], "tiered")  # lists that may be None
    assert tiered.config.curriculum == (0.5,) and tiered.config.boundaries is None
    offsets = [member.config.offsets for member in members([], "hierarchical", grid=["offsets=-1,[-1,0]"])]
    assert offsets == [(-1,), (-1, 0)]
    with pytest.raises(ConfigInvalid, match=r"layers\[0\]: expected a whole number, found 'x'"):
        members(["layers=x"], "crosscoder")


def test_a_name_that_no_file_could_bear_is_refused():
    lists = [f"offsets=[-1],[{','.join('0' * 120)}]"]
    with pytest.raises(ConfigInvalid, match="expected a name of at most 180 characters"):
        members([], "hierarchical", grid=lists)


def members(words, *names, limits=None, grid=()):
    return RunRequest.of_variants(names, parse_settings(words), parse_grid(grid)).members(lambda _: limits or {})


def test_settings_reach_the_variants_that_have_them():
    topk, standard = members(["topk.k=5", "optim.lr=0.1", "width=77"], "topk", "standard")
    assert topk.config.k == 5 and topk.config.width == standard.config.width == 77
    assert topk.config.optim.lr == standard.config.optim.lr == 0.1


@pytest.mark.parametrize(
    ("variant", "words", "grid", "said"),
    [
        ("jumprelu", ["k=2"], (), "leave out --k, or ask for --set target_l0=2$"),
        ("jumprelu", [], ["k=2,3"], "leave out k, or ask for target_l0$"),
        ("gated", ["k=2"], (), "leave out --k$"),
    ],
)
def test_a_variant_that_fixes_no_number_of_active_latents_says_so(variant, words, grid, said):
    with pytest.raises(ConfigInvalid, match=f"{variant}: the number of active latents is not fixed: {said}"):
        members(words, variant, grid=grid)


def test_a_setting_is_for_the_saes_that_read_it():
    """Refused is what none reads of those that it is said of."""
    topk, _ = members(["crosscoder.gate=relu", "k=48"], "topk", "crosscoder")
    assert topk.config.k == 48
    spread = members(["k=48"], "crosscoder", grid=["gate=batchtopk,relu"])
    assert [member.config.gate for member in spread] == ["batchtopk", "relu"]
    with pytest.raises(ConfigInvalid, match="k 48 would be ignored: only gate=batchtopk reads it; set that too"):
        members(["crosscoder.gate=relu", "crosscoder.k=48"], "topk", "crosscoder")


@pytest.mark.parametrize(
    ("words", "names", "grid", "said"),
    [
        (["k=32", "seed=1", "data.seed=2"], ["topk", "jumprelu", "gated"], (), ["k is not read by jumprelu, gated"]),
        ([], ["topk", "jumprelu"], ["k=2,3"], ["k is not read by jumprelu"]),
        (
            ["optim.lr=1e-3", "layer=3"],
            ["topk", "pca", "crosscoder"],
            (),
            [f"{key} is not read by {variant}" for key, variant in (("optim.lr", "pca"), ("layer", "crosscoder"))],
        ),
        (["topk.k=32"], ["topk", "jumprelu"], (), []),
        (["k=32"], ["topk"], (), []),
    ],
)
def test_a_setting_for_all_that_some_do_not_read_is_told(words, names, grid, said):
    """They would train at their default, as if they had it."""
    request = RunRequest.of_variants(names, parse_settings(words), parse_grid(grid))
    assert list(request.say_unread(request.members(lambda _: {}))) == said


def test_limits_bound_defaults_and_not_wishes():
    (member,) = members(["k=50"], "topk", limits={"k": 8, "width": 256})
    assert (member.config.k, member.config.width) == (50, 256)
    (member,) = members([], "topk", limits={"k": 10**9})
    assert member.config.k == variant_registry.config_type("topk")().k


@pytest.mark.parametrize(
    "variant, words, part",
    [
        ("topk", [], 30),
        ("batchtopk", [], 30),
        ("matryoshka", [], 30),
        ("standard", [], 10),
        ("tiered", [], 10),
        ("tiered", ["base=topk"], 30),
    ],
)
def test_a_latent_is_dead_after_a_part_of_the_budget(variant, words, part):
    asked = RunRequest.of_variants([variant], parse_settings(words))
    (member,) = asked.members(lambda config: {"dead_after_tokens": 3_000_000 // config.dead_part()})
    assert member.config.dead_after_tokens == 3_000_000 // part


@pytest.mark.parametrize(
    ("width", "d_model", "rate"),
    [(2**14, 2304, 4e-4), (2**16, 2304, 2e-4), (2**14, 576, 8e-4), (2304, 576, 2.133e-3)],
)
def test_the_default_rate_falls_with_the_root_of_both_widths(width, d_model, rate):
    assert topk_optim(Optim(), width, d_model).lr == pytest.approx(rate, rel=1e-3)


def test_a_variant_asked_for_twice_is_one():
    assert [member.label for member in members([], "topk", "topk")] == ["topk"]


def test_lists_of_a_grid_have_labels_of_their_own():
    found = members([], "crosscoder", grid=["layers=[1,2],[12]"])
    assert [member.label for member in found] == ["crosscoder_layers1-2", "crosscoder_layers12"]


def test_a_grid_that_a_setting_gives_too_is_refused():
    for said, spread in (("k", "k"), ("topk.k", "k"), ("k", "topk.k")):
        with pytest.raises(ConfigInvalid, match=f"expected {spread} only in --grid, found {said}=5 in an option"):
            members([f"{said}=5"], "topk", grid=[f"{spread}=2,4"])
    found = members(["k=5"], "topk", "batchtopk", grid=["topk.k=2,4"])
    assert [member.config.k for member in found] == [2, 4, 5]


@pytest.mark.parametrize("seed", [-1, 2**40, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ConfigInvalid, match=f"topk: seed: expected a number from 0 to below 2\\*\\*40, found {seed}"):
        members([f"seed={seed}"], "topk")


def test_two_saes_of_one_label_are_refused():
    with pytest.raises(ConfigInvalid, match="two SAEs of the run would both be called one"):
        RunRequest((Sae("one", "topk"), Sae("one", "standard"))).members(lambda _: {})


@pytest.mark.parametrize("variant", variant_registry.names())
def test_every_variants_run_is_written_and_read(variant):
    """Found by the folder: the record survives JSON."""
    config = RunConfig(DataConfig(), CourseConfig(), members([], variant, grid=["seed=0,1"]))
    assert read_run_config(config.to_json(), "config.json") == config


def test_a_damaged_record_is_named():
    raw = RunConfig(DataConfig(), CourseConfig(), members([], "topk")).to_json()
    raw["data"]["seedling"] = 1
    with pytest.raises(
        ConfigInvalid, match=r"config\.json is not the configuration of a run: data\.seedling: unknown key"
    ):
        read_run_config(raw, "config.json")
    saes = {"topk": {"config": {}}}
    for broken, said in (
        ({}, "saes: missing"),
        ({"saes": {}}, "one or more"),
        ({"saes": [1]}, r"saes: .* found \[1\]"),
    ):
        with pytest.raises(ConfigInvalid, match=f"{said}.*; copy the folder again"):
            read_run_config({} if not broken else raw | {"data": {}} | broken, "config.json")
    with pytest.raises(ConfigInvalid, match="saes.topk.variant: missing"):
        read_run_config(raw | {"saes": saes}, "config.json")


def test_a_run_of_before_goes_on_with_a_share_that_would_be_refused_now():
    raw = RunConfig(DataConfig(), CourseConfig(), members([], "standard")).to_json()
    raw["saes"]["standard"]["config"]["penalty_warmup_fraction"] = 2.0
    assert read_run_config(raw, "config.json").members[0].config.penalty_warmup_fraction == 2.0


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().seed = 1  # pyright: ignore


@pytest.mark.parametrize("label", ["../../x", "/tmp/x", "a/b", "..", ""])
def test_a_foreign_runs_labels_lead_out_of_no_folder(label):
    (member,) = members([], "topk")
    raw = RunConfig(DataConfig(), CourseConfig(), (dataclasses.replace(member, label=label),)).to_json()
    with pytest.raises(ConfigInvalid, match="folder names"):
        read_run_config(raw, "config.json")
