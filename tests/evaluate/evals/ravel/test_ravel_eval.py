"""RAVEL on a planted model, where a subspace carries an attribute, and the gradient it needs of real ones."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from saemill.evaluate.context.context import Context
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.errors import DataMissing, NotApplicable, SettingInvalid
from saemill.evaluate.evals.ravel import evaluation as ravel
from saemill.evaluate.evals.ravel.prompts_and_pairs import EntityClass, count_identifiers, load_facts, make_prompts
from saemill.harvest.progress import Watch
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder

BOS, ASK_COLOUR, ASK_SIZE, FIRST_ENTITY = 1, 2, 3, 4
ANSWERS = ("red", "blue", "big", "small")
FIRST_ANSWER = 40
D = 6
"""Two directions for the colour, two for the size, two for what is asked."""
ENTITIES = {f"e{i}": {"Colour": ANSWERS[i % 2], "Size": ANSWERS[2 + i // 2 % 2]} for i in range(32)}
IDS = {"colour": ASK_COLOUR, "size": ASK_SIZE, **{name: FIRST_ENTITY + i for i, name in enumerate(ENTITIES)}}
THINGS = EntityClass("thing", ENTITIES, {"Colour": ("colour %s",), "Size": ("size %s",)})


class Words:
    """A token for each word."""

    digest = "words"
    backend = SimpleNamespace(
        decode_batch=lambda rows, skip_special_tokens: [
            "".join(ANSWERS[token - FIRST_ANSWER] if token >= FIRST_ANSWER else "?" for token in row) for row in rows
        ]
    )

    def encode(self, texts):
        return [[IDS[word] for word in text.split()] for text in texts]


class PlantedModel:
    """At an entity stand its colour, its size and what is asked; the answer reads the one that is asked."""

    facts = SimpleNamespace(num_layers=4, d_model=D, max_context=16)
    dtype, device, special, bos, pad, eos = torch.float32, torch.device("cpu"), (0, BOS), BOS, 0, None
    tokenizer = Words()

    def resid(self, tokens, layers, valid=None, sinks=None):
        out = torch.zeros(*tokens.shape, D)
        for w, t in (tokens >= FIRST_ENTITY).nonzero().tolist():
            facts = list(ENTITIES.values())[tokens[w, t] - FIRST_ENTITY]
            asked = 4 + int(tokens[w, t - 1] == ASK_SIZE)
            out[w, t, [ANSWERS.index(facts["Colour"]), ANSWERS.index(facts["Size"]), asked]] = 1.0
        return dict.fromkeys(layers, out)

    def last_logits(self, resid, layer, valid=None):
        x = resid[:, -1]
        answers = torch.cat([x[:, :2] * 10 * x[:, 4:5], x[:, 2:4] * 10 * x[:, 5:6]], dim=1)
        return torch.cat([torch.zeros(len(x), FIRST_ANSWER), answers], dim=1)

    calls = 0
    model = SimpleNamespace(parameters=lambda: [torch.ones(2)])

    def complete(self, tokens, count, valid, splice=None):
        self.calls += 1
        (resid,) = self.resid(tokens, (0,)).values()
        for change in (splice or {}).values():
            resid = change(resid)
        return self.last_logits(resid, 0).argmax(-1, keepdim=True)


def aligned_sae() -> SparseAutoencoder:
    return SparseAutoencoder(torch.eye(D), torch.eye(D), Relu())


def blind_sae() -> SparseAutoencoder:
    """Nothing but what is asked: its reconstruction has lost all attributes."""
    W = torch.eye(D)
    W_enc = W.clone()
    W_enc[:4] = 0
    return SparseAutoencoder(W_enc, W, Relu())


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(ravel, "load_facts", lambda names: [THINGS])
    made = Context(None, model_name="planted", watch=Watch(is_quiet=True))
    made._model = PlantedModel()  # type: ignore[assignment]
    return made


@pytest.fixture
def config(tmp_path) -> Callable[..., ravel.Config]:
    def make(**changes: object) -> ravel.Config:
        settings = {"llm_batch_size": 2, "num_epochs": 20, "learning_rate": 0.05, "cache": str(tmp_path / "cache")}
        selection = {"thing": ("Colour", "Size")}
        return ravel.Config(data="ravel", entity_attribute_selection=selection, **settings | changes)

    return make


def test_an_aligned_sae_has_cause_and_isolation_of_one_and_a_blind_one_neither(context, builder, config):
    subjects = [
        builder.subject(aligned_sae(), "aligned", layers=(2,)),
        builder.subject(blind_sae(), "blind", layers=(2,)),
    ]
    state, torch_state = random.getstate(), torch.random.get_rng_state()
    aligned, blind = ravel.evaluate(context, subjects, config())
    assert aligned.metrics["ravel"] == {"disentanglement_score": 1.0, "cause_score": 1.0, "isolation_score": 1.0}
    assert blind.metrics["ravel"]["cause_score"] == 0.0
    assert set(aligned.unstructured["thing_results"]) == {"thing_Colour", "thing_Size"}
    assert aligned.extra["ravel"]["by_kind"]["disentangle_score"] == 1.0
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_an_untrained_mask_isolates_and_causes_nothing(context, builder, config):
    subject = builder.subject(aligned_sae(), layers=(2,))
    (result,) = ravel.evaluate(context, [subject], config(learning_rate=0.0))
    assert result.metrics["ravel"] == {"disentanglement_score": 0.5, "cause_score": 0.0, "isolation_score": 1.0}


def test_prompts_are_no_longer_than_the_windows_of_an_sae_that_reads_places(context, builder, config, monkeypatch):
    monkeypatch.setattr(LoadedSae, "needs", frozenset({"position"}))
    short, fits = (builder.subject(aligned_sae(), f"of {n}", layers=(2,), context_size=n) for n in (2, 3))
    failure, result = ravel.evaluate(context, [short, fits], config(num_epochs=1))
    assert failure.subject is short and "windows of 2, but a text of this evaluation has up to 3" in str(failure.error)
    assert result.subject is fits


@pytest.mark.parametrize(
    "selection",
    [
        {"city": ("Country",)},
        {"thing": ("Colour", "Weight")},
        {"thing": ()},
        {"thing": ("Colour",)},
        {"thing": ("Colour", "Colour")},
    ],
)
@pytest.mark.parametrize("data", ["ravel", "stdlib"])
def test_a_selection_without_two_attributes_of_the_data_is_named(
    context, builder, config, monkeypatch, selection, data
):
    """With one, nothing would be left that has to stay."""
    monkeypatch.setattr(PlantedModel, "complete", lambda *_: pytest.fail("the model was asked"))
    monkeypatch.setattr(ravel, "load_identifiers", lambda: [THINGS])
    settings = dataclasses.replace(config(), entity_attribute_selection=selection, data=data)
    with pytest.raises(
        SettingInvalid, match=r"expected attributes of thing \(Colour, Size\), found .* two attributes or more"
    ):
        list(ravel.evaluate(context, [builder.subject(aligned_sae(), layers=(2,))], settings))


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, float("nan")])
def test_a_split_without_pairs_on_either_side_is_refused(context, builder, config, share):
    with pytest.raises(
        SettingInvalid, match=f"train_test_split: expected a share .*more than 0 and less than 1, found {share}"
    ):
        list(ravel.evaluate(context, [builder.subject(aligned_sae(), layers=(2,))], config(train_test_split=share)))


def test_an_entity_is_found_by_tokenizers_that_begin_every_text_with_a_space():
    things = EntityClass("thing", {"cat": {"Colour": "red"}}, {"Colour": ("the %s is",)})
    (prompt,) = make_prompts(things, ["Colour"], lambda texts: [list(f" {text}") for text in texts], BOS)
    assert prompt.tokens[: prompt.entity_position + 1][-3:] == tuple("cat")


class Notes:
    """Stands for a trial: which pairs it learned from, and which it was judged on."""

    def learn(self, pairs, epochs, lr, batch_size, advance):
        self.learned = list(pairs)
        return {}

    def completions(self, pairs, chosen, count, batch_size, advance):
        self.judged = list(pairs)
        return pairs, {}


def test_masks_are_judged_on_pairs_that_they_did_not_learn_from(context, config):
    notes, pairs = Notes(), list(range(10))
    ravel.swap_attribute(context, notes, "thing", "Colour", pairs, {}, config(train_test_split=0.7))
    assert (notes.learned, notes.judged) == (pairs[:7], pairs[7:])


def test_what_the_model_says_is_asked_once_for_all_runs(context, config):
    attributes = ("Colour", "Size")
    first = ravel.known_prompts(context, THINGS, attributes, config())
    calls = context.model.calls
    assert ravel.known_prompts(context, THINGS, attributes, config()) == first
    assert context.model.calls == calls
    ravel.known_prompts(context, THINGS, attributes, config(n_generated_tokens=2))
    assert context.model.calls > calls


def test_what_another_model_says_or_what_is_said_to_other_prompts_is_asked_again(context, config):
    ravel.known_prompts(context, THINGS, ("Colour", "Size"), config())
    calls = context.model.calls
    ravel.known_prompts(context, THINGS, ("Colour",), config())
    assert context.model.calls > calls
    calls = context.model.calls
    context.model.model = SimpleNamespace(parameters=lambda: [torch.ones(3)])
    ravel.known_prompts(context, THINGS, ("Colour",), config())
    assert context.model.calls > calls


def test_too_few_pairs_for_a_batch_are_a_reason_not_to_run(context, builder, config):
    with pytest.raises(NotApplicable, match="do not fill one batch of 64"):
        list(ravel.evaluate(context, [builder.subject(aligned_sae(), layers=(2,))], config(llm_batch_size=64)))


def test_a_model_that_answers_nothing_right_is_a_reason_not_to_run(context, builder, config, monkeypatch):
    monkeypatch.setattr(ravel, "known_prompts", lambda *_: [])
    with pytest.raises(NotApplicable, match="the model answers prompts about 'Colour' with 0 different labels"):
        list(ravel.evaluate(context, [builder.subject(aligned_sae(), layers=(2,))], config()))


def test_prompts_of_the_hub_are_asked_for_by_name(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(DataMissing, match="adamkarvonen/ravel_prompts"):
        load_facts(["city"])


def test_identifiers_are_counted_where_a_value_or_a_statement_stands():
    text = "    x = os.path\n" * 5 + "    os.close()\n" * 6 + "    x = os.environ\n" + "    y = rare.one\n"
    entities = count_identifiers([text])
    assert entities.facts == {"os.": {"Value": "path", "Statement": "close"}}


def test_last_logits_are_the_models_and_have_the_gradient_of_finite_differences(world, language_model, builder):
    model = language_model(world.model)
    tokens = world.tokens[:2]
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, :3] = False
    resid = model.resid(tokens, (builder.LAYER,), valid)[builder.LAYER].clone()
    logits = model.last_logits(resid, builder.LAYER, valid)
    whole = model.head(model.suffix(resid, builder.LAYER, valid)[:, -1])
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)

    resid.requires_grad_()
    model.last_logits(resid, builder.LAYER, valid)[:, 5].sum().backward()
    step = torch.zeros_like(resid)
    step[0, 4, 3] = 1e-2
    with torch.no_grad():
        up, down = (model.last_logits(resid + sign * step, builder.LAYER, valid)[:, 5].sum() for sign in (1, -1))
    assert resid.grad is not None
    assert resid.grad[0, 4, 3].item() == pytest.approx((up - down).item() / 2e-2, rel=2e-2, abs=1e-3)


def by_whole_passes(model, tokens_WT, count, layer, change, valid_WT):
    """The next tokens by one pass over all tokens for each; the change acts on every pass."""
    for _ in range(count):
        resid = model.resid(tokens_WT, (layer,), valid_WT)[layer]
        last_WD = model.suffix(change(resid), layer, valid_WT)[:, -1]
        tokens_WT = torch.cat([tokens_WT, model.head(last_WD).argmax(dim=-1, keepdim=True)], dim=1)
        valid_WT = torch.cat([valid_WT, valid_WT.new_ones(len(valid_WT), 1)], dim=1)
    return tokens_WT[:, -count:]


@pytest.mark.parametrize("name", [None, "cache", "past_key_values"])
def test_completions_with_kept_keys_are_those_of_whole_passes(world, language_model, builder, monkeypatch, name):
    """Also if transformers knows the cache by another name than the installed version."""
    model = language_model(world.model)
    forward = model.stack.forward
    own = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def by_cache(*, cache=None, **words):
        return forward(**words, **{own: cache})

    def by_values(*, past_key_values=None, **words):
        return forward(**words, **{own: past_key_values})

    tokens = world.tokens[:4, :9]
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, :3], valid[2, :5] = False, False
    shift = torch.randn(builder.D, generator=torch.Generator().manual_seed(0))

    def change(resid):
        changed = resid.clone()
        changed[:, 6] += 3 * shift
        return changed

    changes = [({}, lambda resid: resid), ({builder.LAYER: change}, change)]
    wholes = [by_whole_passes(model, tokens, 5, builder.LAYER, made, valid).tolist() for _, made in changes]
    if name is not None:
        monkeypatch.setattr(model.stack, "forward", {"cache": by_cache, "past_key_values": by_values}[name])
    assert [model.complete(tokens, 5, valid, given).tolist() for given, _ in changes] == wholes
