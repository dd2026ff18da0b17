"""The templates of a variant in CONTRIBUTING.md are variants: the registry finds them, and they pass the battery."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from saemill.train import variants
from saemill.train.errors import ConfigInvalid
from saemill.train.kit import variant_registry
from saemill.train.sae.side_inputs import NO_SIDE

from . import test_battery

NAME = "of_contributing"


CHECKS = {name: check for name, check in vars(test_battery).items() if name.startswith("test_")}


@pytest.fixture
def add_variant(tmp_path, monkeypatch):
    """A function that puts a file beside those in train/variants/."""
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(tmp_path)])

    def add(code: str) -> None:
        (tmp_path / f"{NAME}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"{variant_registry.PACKAGE}.{NAME}", raising=False)

    yield add
    sys.modules.pop(f"{variant_registry.PACKAGE}.{NAME}", None)


@pytest.mark.parametrize(
    ("file", "check"),
    [("overlap", check) for check in CHECKS] + [("one_of_each", check) for check in CHECKS if "planted" not in check],
)
def test_the_template_passes_the_battery(check, file, add_variant, template, request):
    add_variant(template(f"train/variants/{file}.py"))
    assert NAME in variant_registry.names()
    given = {"variant": NAME, "changes": {}}
    wanted = inspect.signature(CHECKS[check]).parameters
    CHECKS[check](**{name: given[name] if name in given else request.getfixturevalue(name) for name in wanted})


def test_the_template_can_be_wrapped(add_variant, template, battery):
    add_variant(template("train/variants/overlap.py"))
    assembly = battery.config_of("positional", base=NAME).build(battery.D)
    assert "overlap" in {term.name for term in assembly.terms}


def test_the_template_of_a_gate_keeps_the_largest_of_each_group(add_variant, template):
    """Seven latents of three groups, 0 3 6, 1 4 and 2 5; nothing of the last is above zero."""
    add_variant(template("train/variants/one_of_each.py"))
    gate = variant_registry.module(NAME).OneOfEach(3)
    pre = torch.tensor([[1.0, 2.0, -1.0, 3.0, 1.0, -2.0, 4.0]])
    assert gate.infer(pre, torch.zeros(7)).tolist() == [[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 4.0]]
    assert sorted(gate.choose(pre, NO_SIDE).latents.tolist()) == [1, 2, 6]


def test_a_file_without_a_config_is_named(add_variant):
    add_variant("class Config: pass\n")
    with pytest.raises(ConfigInvalid, match=rf"{NAME}\.py: expected a class Config that extends Variant"):
        variant_registry.config_type(NAME)
