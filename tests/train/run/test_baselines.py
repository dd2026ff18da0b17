"""`--with-baselines`: who gets which, at the settings of the SAE that they are compared with."""

from __future__ import annotations

import warnings

import pytest

from saemill.train.cli_support import report_errors
from saemill.train.config.parse_settings import parse_grid, parse_settings
from saemill.train.config.run_config import RunRequest
from saemill.train.config.sanity_baselines import with_baselines
from saemill.train.errors import ConfigInvalid

LIMITS = {"width": 512}


def fleet(*variants, words=(), grid=()):
    asked = RunRequest.of_variants(variants, parse_settings(words), parse_grid(grid))
    return with_baselines(asked.members(lambda _: LIMITS), lambda _: {"width": 256})


def test_an_sae_gets_three_frozen_ones_at_its_own_settings_and_its_principal_components():
    members = {member.label: member for member in fleet("topk", words=["k=12", "optim.lr=0.5", "seed=3"])}
    assert list(members) == [
        "topk",
        "topk_frozen_decoder",
        "topk_frozen_soft_decoder",
        "topk_frozen_encoder",
        "pca_k12_layer19",
    ]
    for label, part in [("topk_frozen_decoder", "decoder"), ("topk_frozen_encoder", "encoder")]:
        config = members[label].config
        assert (config.base, config.part, config.k, config.width, config.seed) == ("topk", part, 12, 512, 3)
        assert config.optim == members["topk"].config.optim
        assert config.encoder_product == members["topk"].config.encoder_product
    assert (members["pca_k12_layer19"].config.k, members["pca_k12_layer19"].config.width) == (12, 256)


def test_more_components_than_there_can_be_are_left_out_and_it_is_said():
    with pytest.warns(
        UserWarning, match="topk gets no pca baseline: it needs 257 components, and there are at most 256"
    ):
        labels = [member.label for member in fleet("topk", words=["k=257"])]
    assert labels == ["topk", "topk_frozen_decoder", "topk_frozen_soft_decoder", "topk_frozen_encoder"]
    with report_errors():  # as the command says it
        assert warnings.formatwarning("no pca beside it", UserWarning, __file__, 1) == "warning: no pca beside it\n"


def test_what_two_saes_share_is_there_once():
    labels = [member.label for member in fleet("topk", "attention", words=["attention.base=topk", "k=12", "width=64"])]
    assert [label for label in labels if label.startswith("pca")] == ["pca_k12_layer19"]
    seeds = [member.label for member in fleet("topk", grid=["seed=0,1"])]
    assert sum("frozen" in label for label in seeds) == 6


def test_a_base_at_its_own_k_has_components_too():
    assert [member.label for member in fleet("tiered", words=["base=topk"]) if member.variant == "pca"]


def test_components_are_of_the_same_hook():
    members = {member.label: member for member in fleet("topk", words=["k=12", "hook=mlp_in"])}
    assert members["pca_k12_mlp_in19"].config.hook == "mlp_in"
    assert members["topk_frozen_decoder"].config.hook == "mlp_in"


def test_a_penalty_fixes_no_number_of_components():
    assert not [member for member in fleet("standard") if member.variant == "pca"]


@pytest.mark.parametrize(
    ("variants", "words", "message"),
    [
        (["transcoder"], [], "an SAE that reconstructs tokens of one layer, or whose base does, found transcoder"),
        (
            ["tsae"],
            [],
            "--with-baselines: expected an SAE that reconstructs tokens of one layer, .* found tsae",
        ),
        (["topk"], ["decoder_bias=zero"], "a frozen topk has no setting decoder_bias"),
    ],
)
def test_what_cannot_have_one_is_told(variants, words, message):
    with pytest.raises(ConfigInvalid, match=message):
        fleet(*variants, words=words)
