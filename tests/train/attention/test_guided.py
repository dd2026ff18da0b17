"""A base with guidance: nothing without alpha, refusals before any step, and what alpha is for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.errors import ConfigInvalid
from saemill.train.kit.variant_registry import config_type
from saemill.train.kit.wrapping import build_base
from saemill.train.sae.attention.attention_encoder import mixing_of

BASES = ["standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "p_anneal"]
GUIDED = ["attention", "hierarchical"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", GUIDED)
def test_without_alpha_training_is_the_bases_to_the_bit(battery, variant, base):
    config = battery.quick(variant, base=base, alpha=0.0)
    trainees = [Trainee("x", build(battery.D), 6) for build in (config.build, lambda d: build_base(config, d))]
    for batch in battery.batches(config, 6):
        reports = [trainee.step(batch) for trainee in trainees]
    guided, base_state = (trainee.state() for trainee in trainees)
    own = {name for name in guided if ".extras." in name}
    assert guided.keys() - own == base_state.keys()
    assert [name for name in base_state if not torch.equal(guided[name], base_state[name])] == []
    assert torch.equal(reports[0].measured["loss"], reports[1].measured["loss"])


@pytest.mark.parametrize("base", BASES)
def test_every_base_can_be_guided(battery, base):
    config = battery.quick("hierarchical", base=base, alpha=1.0, alpha_warmup_fraction=0.0)
    _, reports = battery.train(config, 12)
    found = [float(report.measured["loss/guidance"]) for report in reports]
    assert sum(found[-3:]) < sum(found[:3])
    scalars = reports[-1].scalars()
    assert sum(scalars[f"mixing/weight_{layer}"] for layer in (17, 18, 19, 20)) == pytest.approx(1.0)
    assert sum(scalars[f"attention/contribution_{layer}"] for layer in (17, 18, 19, 20)) == pytest.approx(1.0)


def test_the_temperature_of_the_mixture_follows_its_schedule(battery):
    config = battery.quick("hierarchical", mixing_temperature_start=1.5, mixing_temperature=0.5)
    knobs = config.build(battery.D).knobs["mixing_temperature"]
    for step in (0, 100, 1000, 5000):
        expected = float(torch.exp(torch.tensor(-step / 1000.0)) + 0.5)
        assert knobs(step, 7) == pytest.approx(expected)
    _, reports = battery.train(config, 3)
    assert float(reports[0].measured["mixing/temperature"]) == 1.5


def test_an_ablated_layer_is_out(battery):
    config = battery.quick("hierarchical", ablated=(-2, 1), alpha=1.0, alpha_warmup_fraction=0.0)
    trainee, reports = battery.train(config, 4)
    weights = mixing_of(trainee.sae)(1.0)
    assert weights[0] == weights[3] == 0.0
    assert float(reports[-1].measured["attention/contribution_17"]) == 0.0
    alone = battery.quick("hierarchical", offsets=(-1, 0), alpha=1.0, alpha_warmup_fraction=0.0, beta=0.0)
    masked = dataclasses.replace(config, beta=0.0)
    states = [Trainee("x", c.build(battery.D), 4) for c in (alone, masked)]
    for batch in battery.batches(config, 4):
        for trainee in states:
            trainee.step(batch)
    torch.testing.assert_close(states[0].sae.W_enc, states[1].sae.W_enc)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("attention", {"alpha": -0.1}, "alpha: expected 0 or more, found -0.1"),
        ("attention", {"temperature": 0.0}, "temperature: expected more than 0, found 0.0"),
        ("hierarchical", {"mixing_temperature": 0.0}, "mixing_temperature: expected more than 0"),
        ("hierarchical", {"mixing_temperature_start": -1.0}, "mixing_temperature_start: expected more than 0"),
        ("hierarchical", {"offsets": ()}, r"offsets: expected distinct offsets, found \[\]"),
        ("hierarchical", {"offsets": (0, 0)}, "offsets: expected distinct offsets"),
        ("hierarchical", {"ablated": (-2, -1, 0, 1)}, "ablated: expected some of"),
        ("hierarchical", {"ablated": (5,)}, "ablated: expected some of"),
        ("hierarchical", {"beta": -1.0}, "beta: expected 0 or more"),
        ("hierarchical", {"base": "crosscoder"}, "expected a variant that reads tokens of one layer"),
        ("attention", {"base": "attention"}, "expected a variant that wraps no other, found 'attention'"),
        ("attention", {"base": "standard", "k": 3.0}, "base standard has no setting k"),
        ("attention", {"negatives": -1}, "negatives: expected 0 or more"),
        ("attention", {"min_mass": 1.0}, "min_mass: expected 0 or more and less than 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(variant, changes, message):
    with pytest.raises(ConfigInvalid, match=message):
        config_type(variant)(**changes).needs()


def test_a_guided_sae_asks_for_windows_and_the_layers_around_its_own():
    needs = config_type("hierarchical")(layer=7, offsets=(1, -2)).needs()
    assert needs.windows and needs.inputs == (7,) and needs.attention_layers == (5, 8)
    assert config_type("attention")(layer=7, offset=-1).needs().attention_layers == (6,)


class Topics:
    """Windows of tokens that have two words each, and a topic so faint that its penalty costs more than it explains.

    Tokens of one topic attend to each other.
    """

    WORDS, TOPICS, WIDTH, SPAN, WINDOWS = 24, 6, 48, 24, 16
    FAINT = 0.45  # of a word's strength

    def __init__(self, guidance: Any, seed: int = 0) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(torch.randn(self.WIDTH, self.WIDTH, generator=self._rng)).Q
        self._words, self._topics = directions[: self.WORDS], directions[self.WORDS : self.WORDS + self.TOPICS]
        self._as_rows = guidance.as_rows

    def batch(self, layers: tuple[int, ...]) -> tuple[Batch, Tensor]:
        """A batch, and the topic of each row."""
        rows = self.WINDOWS * self.SPAN
        words = torch.rand(rows, self.WORDS, generator=self._rng).topk(2, dim=1).indices
        topic = torch.randint(self.TOPICS, (rows,), generator=self._rng)
        strength = 1.0 + torch.rand(rows, 3, generator=self._rng)
        x = (strength[:, :2, None] * self._words[words]).sum(1) + self.FAINT * strength[:, 2:] * self._topics[topic]
        return Batch(x * (self.WIDTH**0.5 / x.norm(dim=1).mean()), side=self._side(topic, layers)), topic

    def _side(self, topic: Tensor, layers: tuple[int, ...]) -> dict[str, Any]:
        window, position = torch.arange(len(topic)) // self.SPAN, torch.arange(len(topic)) % self.SPAN + 1
        row_of = torch.full((self.WINDOWS, self.SPAN + 1), -1)
        row_of[window, position] = torch.arange(len(topic))
        by_window = topic.view(self.WINDOWS, self.SPAN)
        same = (by_window[:, :, None] == by_window[:, None, :]).tril().float()
        probs = torch.zeros(self.WINDOWS, 1, self.SPAN + 1, self.SPAN + 1)
        probs[:, 0, 1:, 1:] = same / same.sum(-1, keepdim=True)
        attention = {layer: self._as_rows(probs) for layer in layers}
        return {"window": window, "position": position, "row_of": row_of, "attention": attention}


def found_topics(battery: Any, topics: Topics, steps: int = 400, **changes: Any) -> float:
    """Mean over topics of the correlation with the latent that tells it best."""
    config = battery.quick("attention", lr=3e-3, penalty=0.4, width=36, seed=1, **changes)  # of a start as drawn
    trainee = Trainee("x", config.build(topics.WIDTH), steps)
    for _ in range(steps):
        trainee.step(topics.batch(config.attention_layers)[0])
    batch, topic = topics.batch(config.attention_layers)
    fires = (trainee.sae.encode(batch.x).detach() > 0).double()
    is_topic = functional.one_hot(topic, topics.TOPICS).double()
    fires, is_topic = (functional.normalize(table - table.mean(0), dim=0) for table in (fires, is_topic))
    return float((fires.t() @ is_topic).amax(0).mean())


def test_tokens_that_attend_to_each_other_come_to_share_a_latent(guidance, battery):
    """The guided SAE finds the topics; the base and the control, which has everything but the content, do not."""
    assert found_topics(battery, Topics(guidance), alpha=0.1) > 0.9
    assert found_topics(battery, Topics(guidance), alpha=0.0) < 0.4
    assert found_topics(battery, Topics(guidance), alpha=0.1, shuffle_attention=True) < 0.4
