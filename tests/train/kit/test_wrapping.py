"""A base inside another variant's config: what is handed on, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from saemill.train.engine.adam import Optim
from saemill.train.errors import ConfigInvalid
from saemill.train.kit import wrapping
from saemill.train.kit.variant_registry import config_type, names
from saemill.train.kit.wrapping import base_needs, build_base
from saemill.train.sae.gates import TopK
from saemill.train.sae.kernels.codes import Codes
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.variants import topk

D = 16
PAGE = Path(__file__).parents[3] / "docs" / "train.md"
LAST_TIER = {"importance": "fixed", "tier_weights": (0.0, 0.0, 1.0), "composition_weight": 0.0}


@dataclass(frozen=True)
class Wrapping(wrapping.Wrapping):
    layer: int = 3
    width: int = 64
    seed: int = 1
    alpha: float = 0.1

    def needs(self):
        return base_needs(self)

    def build(self, d_model, stats=None):
        return build_base(self, d_model, stats)


def test_shared_settings_are_handed_on():
    assembly = build_base(Wrapping(base="topk", k=3), D)
    expected = config_type("topk")(layer=3, width=64, k=3, seed=1).build(D)
    assert isinstance(assembly.sae.gate, TopK) and assembly.sae.gate.k == 3
    assert all(torch.equal(a, b) for a, b in zip(assembly.sae.parameters(), expected.sae.parameters(), strict=True))
    assert assembly.optim == expected.optim
    assert base_needs(Wrapping(layer=7)).layers == (7,)


def test_the_optimiser_is_the_bases_own_but_for_what_was_chosen():
    assert build_base(Wrapping(base="jumprelu"), D).optim.beta1 == 0.0
    chosen = build_base(Wrapping(base="jumprelu", optim=Optim(lr=0.5, clip_norm=1.0)), D).optim
    assert (chosen.lr, chosen.clip_norm, chosen.beta1) == (0.5, 1.0, 0.0)


def test_what_is_everybodys_default_can_be_chosen_too():
    assert build_base(Wrapping(base="jumprelu", optim=Optim(beta1=0.9)), D).optim.beta1 == 0.9
    assert build_base(Wrapping(base="topk", optim=Optim(epsilon=1e-8)), D).optim.epsilon == 1e-8


def test_a_sparsity_that_nobody_chose_fits_the_width_of_the_residual():
    assert build_base(Wrapping(base="topk"), D).sae.gate.k == D // 4


def test_a_count_stays_a_count():
    """A config in JSON says 3.0, and no top-k takes that."""
    gate = build_base(Wrapping(base="topk", k=3.0), D).sae.gate
    assert gate.k == 3 and isinstance(gate.k, int)
    assert build_base(Wrapping(base="batchtopk", k=2.5), D).sae.gate.k == 2.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Wrapping(base="topk", k=2.5), r"k: expected a whole number for the base topk, found 2\.5"),
        (Wrapping(base="topk", penalty=0.1), "base topk has no setting penalty"),
        (Wrapping(base="standard", k=4.0), "base standard has no setting k"),
        (Wrapping(base="crosscoder"), "found 'crosscoder'"),
        (Wrapping(base="transcoder"), "found 'transcoder'"),
        (Wrapping(base="pca"), "expected a variant that learns, found the baseline 'pca'"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(config, message):
    with pytest.raises(ConfigInvalid, match=message):
        build_base(config, D)


def test_an_unknown_base_names_its_neighbour():
    with pytest.raises(ConfigInvalid, match="topk"):
        build_base(Wrapping(base="topkk"), D)


NESTED, OWN_ENCODER = "matryoshka hierarchical_topk treesae", "matching_pursuit treesae"
TAKES_NO = [
    ("frozen", {}, ""),
    ("attention", {}, ""),
    ("attention", {"guidance": "encode"}, OWN_ENCODER),
    ("hierarchical", {}, ""),
    ("hierarchical", {"guidance": "encode"}, OWN_ENCODER),
    ("tiered", {}, NESTED),
    ("tiered", LAST_TIER, ""),
    ("tiered", LAST_TIER | {"tier_norm": True}, OWN_ENCODER),
    ("tiered", LAST_TIER | {"curriculum": (0.0, 0.1, 0.2)}, OWN_ENCODER),
    ("positional", {"mask": "static_slicing"}, ""),
    ("positional", {}, OWN_ENCODER),
    ("temporal", {}, ""),
    ("temporal", {"position_gate": True}, OWN_ENCODER),
    ("temporal", {"prune_share": 0.5}, "abstopk"),
]


@pytest.mark.parametrize(("variant", "settings", "refused"), TAKES_NO)
def test_which_base_a_variant_takes_is_as_the_page_says(battery, variant, settings, refused):
    def is_built(base):
        try:
            battery.config_of(variant, base=base, **settings).build(battery.D)
        except ConfigInvalid:
            return False
        return True

    free = {name for name in names() if not hasattr(config_type(name), "base")}
    plain = config_type("topk")().needs()
    bases = {name for name in free if config_type(name)().needs() == plain and not config_type(name).is_baseline}
    assert {name for name in free if is_built(name)} == bases - set(refused.split())
    assert f"no `{refused}`" in PAGE.read_text() or not refused


class Halved(SparseAutoencoder):
    """An SAE that is not the plain one."""

    def codes(self, x, side=None) -> Codes:
        return super().codes(x / 2)


@pytest.fixture
def halved_base(monkeypatch):
    """The base `topk` builds a subclass."""

    def build(config, d_model, stats=None):
        assembly = plain(config, d_model, stats)
        return assembly.with_sae(Halved(**assembly.sae.parts()))

    plain = topk.Config.build
    monkeypatch.setattr(topk.Config, "build", build)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("positional", {"context": 16}),
        ("tiered", {"tier_norm": True}),
        ("temporal", {"position_gate": True, "context": 16}),
        ("attention", {"guidance": "encode"}),
    ],
)
def test_a_base_with_a_class_of_its_own_is_not_trained_as_a_plain_one(halved_base, variant, settings):
    config = config_type(variant)(base="topk", k=3, width=64, **settings)
    with pytest.raises(ConfigInvalid, match=r"found test_wrapping\.Halved: only its weights .* Choose another base"):
        config.build(D)


def test_matching_pursuit_is_not_trained_as_top_k():
    config = config_type("positional")(base="matching_pursuit", k=3, width=64, context=16)
    with pytest.raises(ConfigInvalid, match=r"found matching_pursuit\.Pursuit"):
        config.build(D)
    assert type(config_type("attention")(base="matching_pursuit", k=3, width=64).build(D).sae).__name__ == "Pursuit"


def test_a_base_with_a_class_of_its_own_is_kept_where_nothing_is_wrapped(halved_base):
    assert type(config_type("attention")(base="topk", k=3, width=64).build(D).sae) is Halved
