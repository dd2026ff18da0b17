"""The folder of variants as a registry, and settings no run can satisfy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saemill import train
from saemill.train.errors import ConfigInvalid
from saemill.train.kit import variant_registry


def test_the_registry_is_the_folder():
    files = {path.stem for path in (Path(train.__path__[0]) / "variants").glob("*.py")} - {"__init__"}
    assert set(variant_registry.names()) == files
    assert {"standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "p_anneal"} <= files


@pytest.mark.parametrize("variant", variant_registry.names())
def test_the_page_says_what_a_variant_does(variant):
    page = (Path(train.__path__[0]).parent / "docs" / "train.md").read_text()
    assert re.search(rf"^\| `{variant}` \| \S", page, re.MULTILINE), f"the table of docs/train.md lacks {variant}"


def test_an_unknown_variant_names_its_neighbours():
    with pytest.raises(ConfigInvalid, match=r"'topkk' .did you mean.*'topk'"):
        variant_registry.config_type("topkk")


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("topk", {"width": 16, "k": 17}, "k: expected more than 0 and at most width = 16, found 17"),
        ("batchtopk", {"width": 16, "k": 0.0}, "found 0.0"),
        (
            "matryoshka",
            {"prefix_fractions": (0.5, 0.5, 1.0)},
            r"rising shares of the dictionary, the last 1, found \(0.5, 0.5, 1.0\)",
        ),
        ("matryoshka", {"prefix_fractions": (0.5,)}, r"the last 1, found \(0.5,\)"),
        ("matryoshka", {"prefix_fractions": (1.0, 1e308)}, r"the last 1, found \(1.0, 1e\+308\)"),
        ("matryoshka", {"width": 16}, r"prefix_fractions: --width 16 is too small for the shares \(0.03125, "),
        ("treesae", {"width": 16, "k": 2}, r"found \(0.8125, 0.1875\) of --k 2, which give \(2, 0\): choose other"),
        ("positional", {"mask_cutoff": 1.0}, "mask_cutoff: expected 0 or more and less than 1, found 1.0"),
        ("matryoshka", {"width": 160, "k": 2.0, "prefix_weights": (1.0,)}, "prefix_weights: expected 5, found 1"),
        ("matryoshka", {"width": 160, "k": 2.0, "prefix_weights": (0.0,) * 5}, "prefix_weights: expected one or more"),
        ("jumprelu", {"width": 16, "target_l0": 20.0}, "^target_l0: .* found 20.0"),
        ("jumprelu", {"width": 160, "bandwidth": 0.0}, "bandwidth"),
        ("jumprelu", {"width": 160, "initial_threshold": -0.1}, "initial_threshold"),
        ("standard", {"penalty": -1.0}, "penalty"),
        ("gated", {"penalty": -1.0}, "penalty"),
        ("p_anneal", {"p_end": 0.0}, "p_end"),
    ],
)
def test_settings_that_contradict_are_refused(variant, settings, message):
    with pytest.raises(ConfigInvalid, match=message):
        variant_registry.config_type(variant)(**settings).build(8)


def test_requests_that_contradict_are_refused():
    with pytest.raises(ConfigInvalid, match="a layer other than"):
        variant_registry.config_type("transcoder")(layer=3, to_layer=3).needs()
    with pytest.raises(ConfigInvalid, match="distinct"):
        variant_registry.config_type("crosscoder")(layers=(3, 3)).needs()
