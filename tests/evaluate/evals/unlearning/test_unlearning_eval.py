"""The whole evaluation on a planted model: what is forgotten, what is retained, what is refused."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from saemill.evaluate.context import evaluation_data_sets
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.context.write_and_read_results import Failure
from saemill.evaluate.errors import DataMissing, NotApplicable, SettingInvalid, WidthMismatch
from saemill.evaluate.evals.unlearning import evaluation as unlearning
from saemill.evaluate.evals.unlearning import interventions, texts_and_exams
from saemill.evaluate.evals.unlearning.exams import ChoicePaper, Question, TextPaper
from saemill.evaluate.evals.unlearning.interventions import Sweep, known_questions, remembered_questions
from saemill.evaluate.evals.unlearning.texts_and_exams import Material
from saemill.harvest.progress import Watch
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder

VOCAB, TOPIC = 12, (3, 4, 5, 6)
D = VOCAB
OFFICIAL_KEYS = [
    "random_seed",
    "dataset_names",
    "intervention_method",
    "retain_thresholds",
    "n_features_list",
    "multipliers",
    "dataset_size",
    "seq_len",
    "n_batch_loss_added",
    "target_metric",
    "save_metrics",
    "model_name",
    "llm_batch_size",
    "llm_dtype",
]


def successor(token: int) -> int:
    """Two cycles: the topic's tokens, and all others."""
    if token in TOPIC:
        return TOPIC[(TOPIC.index(token) + 1) % len(TOPIC)]
    return 7 + (token - 6) % 5


class PlantedModel:
    """Its residual is the next token as one of D directions, and its answer is the largest of them."""

    facts = SimpleNamespace(num_layers=3, d_model=D, max_context=64)
    dtype, device = torch.float32, torch.device("cpu")
    special, bos, eos, pad = (0, 1, 2), 2, 1, 0
    calls = 0

    def resid(self, tokens, layers, valid=None, sinks=None):
        following = torch.tensor([successor(token) for token in range(VOCAB)])
        return {layer: torch.eye(VOCAB)[following[tokens]] for layer in layers}

    def suffix(self, resid, layer, valid=None):
        return resid

    def hidden(self, tokens, splice=None, valid=None):
        self.calls += 1
        return self.resid(tokens, (0,))[0]

    def head(self, hidden):
        return hidden.clone()


def rows(start: int, count: int = 4, length: int = 12) -> torch.Tensor:
    cycle = [2, start]
    while len(cycle) < length:
        cycle.append(successor(cycle[-1]))
    return torch.tensor([cycle] * count)


def material() -> Material:
    model = PlantedModel()
    starts = {"topic": 3, "rest": 7, "near the topic": 4}
    topic, rest, near = ([TextPaper(name, rows(start), model.special, batch_size=3)] for name, start in starts.items())
    sweep = Sweep((0.01,), (4,), (25, 50))
    return Material("planted", "planted", model, rows(3), rows(7), topic, rest, sweep, near)


def one_latent_a_token() -> SparseAutoencoder:
    return SparseAutoencoder(torch.eye(D), torch.eye(D), Relu())


def latents_that_fire_on_everything() -> SparseAutoencoder:
    return SparseAutoencoder(torch.eye(D), torch.eye(D), Relu(), b_enc=torch.ones(D))


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(unlearning, "load_material", lambda context, config: material())
    return Context(None, watch=Watch(is_quiet=True))


def test_a_topic_latent_unlearns_its_topic_and_dense_latents_unlearn_nothing(context, builder):
    saes = {"topic": one_latent_a_token(), "dense": latents_that_fire_on_everything()}
    subjects = [builder.subject(sae, name, layers=(1,)) for name, sae in saes.items()]
    state, torch_state = random.getstate(), torch.random.get_rng_state()
    topic, dense = unlearning.evaluate(context, subjects, unlearning.Config())
    assert topic.metrics == {"unlearning": {"unlearning_score": 1.0}}
    assert dense.metrics == {"unlearning": {"unlearning_score": 0.0}}
    assert topic.remark is None and "no latent fires on the text to forget and rarely" in dense.remark
    (first, _) = topic.extra["unlearning"]["runs"]
    assert sorted(first["latents"]) == list(TOPIC)
    assert first["accuracy"] == {"topic": 0.0, "rest": 1.0, "near the topic": 0.0}  # the last decides nothing
    assert list(topic.eval_config) == OFFICIAL_KEYS
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_an_sae_of_another_width_fails_alone(context, builder):
    wide = builder.subject(builder.make_sae(d_in=D + 1), "wide", layers=(1,))
    good = builder.subject(one_latent_a_token(), "good", layers=(1,))
    failure, result = unlearning.evaluate(context, [wide, good], unlearning.Config())
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, WidthMismatch)
    assert result.metrics["unlearning"]["unlearning_score"] == 1.0


def test_rows_are_no_longer_than_the_windows_of_an_sae_that_reads_places(context, builder, monkeypatch):
    monkeypatch.setattr(LoadedSae, "needs", frozenset({"position"}))
    short, fits = (builder.subject(one_latent_a_token(), f"of {n}", layers=(1,), context_size=n) for n in (11, 12))
    failure, result = unlearning.evaluate(context, [short, fits], unlearning.Config())
    assert failure.subject is short and "windows of 11, but a text of this evaluation has" in str(failure.error)
    assert result.subject is fits
    longer = dataclasses.replace(material(), forget=[TextPaper("topic", rows(3, length=13), (0, 1, 2), batch_size=3)])
    monkeypatch.setattr(unlearning, "load_material", lambda *_: longer)
    _, failure = unlearning.evaluate(context, [short, fits], unlearning.Config())
    assert failure.subject is fits and "windows of 12, but a text of this evaluation has up to 13" in str(failure.error)


def test_a_model_that_knows_nothing_is_not_asked(context, builder, monkeypatch):
    monkeypatch.setattr(PlantedModel, "head", lambda self, hidden: -hidden)
    subject = builder.subject(one_latent_a_token(), layers=(1,))
    with pytest.raises(NotApplicable, match="answers no question"):
        list(unlearning.evaluate(context, [subject], unlearning.Config()))


class Letters:
    """A tokenizer of single characters, with the special tokens of the prompt left as they are written."""

    digest = "characters"

    def encode(self, texts):
        return [[ord(text[-1])] if text.strip() in "ABCD" else [ord(c) for c in text] for text in texts]


class AnswersByText(PlantedModel):
    """Says the letter whose choice is "right"; for questions with a bias it says A."""

    tokenizer = Letters()
    model = SimpleNamespace(parameters=lambda: [torch.ones(2)])

    def hidden(self, tokens, splice=None, valid=None):
        self.calls += 1
        texts = ["".join(map(chr, row.tolist())) for row in tokens]
        letters = [("A" if "bias" in text else text[text.index(". right") - 1]) for text in texts]
        return torch.tensor([ord(letter) for letter in letters])[:, None, None].expand(*tokens.shape, 1)

    def head(self, hidden):
        return torch.nn.functional.one_hot(hidden[:, 0], 128).float()


CHOICES = ("right", "w", "x", "y")
QUESTIONS = [Question("s", "good", CHOICES, 0), Question("s", "a bias", CHOICES, 0), Question("s", "also", CHOICES, 0)]


def test_only_questions_right_in_all_orders_are_known_and_they_are_remembered(tmp_path, monkeypatch):
    model = AnswersByText()
    paper = ChoicePaper("quiz", QUESTIONS, model, batch_size=5)
    assert known_questions(model, paper) == [0, 2]  # "bias" is right with the choices as they are written, but by luck
    assert remembered_questions(model, paper, tmp_path) == [0, 2]
    monkeypatch.setattr(interventions, "known_questions", lambda *_: pytest.fail("asked again"))
    assert remembered_questions(model, paper, tmp_path) == [0, 2]
    exam = paper.exam([0, 2])
    assert [len(sheet) for sheet in exam.sheets] == [2]
    assert exam.longest == len(QUESTIONS[0].prompt()) < len(QUESTIONS[1].prompt())  # which is not asked


@pytest.mark.parametrize("change", ["question", "answer", "model"])
def test_what_is_asked_otherwise_is_asked_again(tmp_path, change):
    model, questions = AnswersByText(), QUESTIONS[:1]
    known = [] if change != "model" else [0]
    assert remembered_questions(model, ChoicePaper("quiz", questions, model, batch_size=5), tmp_path) == [0]
    if change == "question":
        questions = QUESTIONS[1:2]
    elif change == "answer":
        questions = [dataclasses.replace(QUESTIONS[0], answer=1)]
    else:
        model.model = SimpleNamespace(parameters=lambda: [torch.ones(3)])
    calls = model.calls
    assert remembered_questions(model, ChoicePaper("quiz", questions, model, batch_size=5), tmp_path) == known
    assert model.calls > calls


def test_the_forget_corpus_is_asked_for_by_name(tmp_path):
    with pytest.raises(DataMissing, match="bio-forget-corpus.jsonl with the form"):
        texts_and_exams.read_corpus(tmp_path / "nowhere.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(DataMissing, match="expected a JSON object with 'text'"):
        texts_and_exams.read_corpus(tmp_path / "bad.jsonl")
    words = "long \u2028\x85" * 20  # which end a line of text, and none of JSON
    (tmp_path / "good.jsonl").write_text(f'{{"text": "{words}"}}\r\n\n{{"text": "short"}}\n', encoding="utf-8")
    assert texts_and_exams.read_corpus(tmp_path / "good.jsonl") == [words]


@pytest.mark.parametrize(
    "names", [(), ("wmdp-bio",), ("wmdp-bio", "college_biology"), ("human_aging", "college_biology")]
)
def test_data_sets_without_a_topic_or_without_a_rest_are_refused_before_anything_is_read(names):
    config = unlearning.Config(data="wmdp", forget_corpus="nowhere.jsonl", dataset_names=names)
    with pytest.raises(SettingInvalid, match="unlearning.dataset_names: expected wmdp-bio .*college_biology is not"):
        unlearning.load_material(Context(None, watch=Watch(is_quiet=True)), config)


@pytest.mark.parametrize(
    ("data", "name", "value"),
    [
        ("stdlib", "forget_corpus", "mine.jsonl"),
        ("stdlib", "dataset_names", ("wmdp-bio", "human_aging")),
        ("stdlib", "dataset_size", 8),
        ("stdlib", "seq_len", 64),
        ("stdlib", "model", "google/gemma-2-9b-it"),
        ("wmdp", "topic", "email"),
    ],
)
def test_settings_of_other_data_are_refused_and_not_remembered_as_if_they_held(data, name, value):
    config, other = unlearning.Config(data=data, **{name: value}), {"stdlib": "wmdp", "wmdp": "stdlib"}[data]
    said = rf"unlearning\.{name}: only for the data {other}, but the .* are {data} .*--set unlearning\.data={other}$"
    with pytest.raises(SettingInvalid, match=said):
        unlearning.load_material(Context(None, watch=Watch(is_quiet=True)), config)


@pytest.mark.parametrize("text", ["", '{"text": "short"}\n'])
def test_a_forget_corpus_without_a_long_text_is_refused_before_the_model_is_loaded(text, tmp_path, monkeypatch):
    corpus, asked = tmp_path / "empty.jsonl", []
    corpus.write_text(text)
    monkeypatch.setattr(texts_and_exams, "load_rows", lambda *words: asked.append(words) or [])
    monkeypatch.setattr(texts_and_exams, "load_instructed", lambda *words: asked.append(words))
    config = unlearning.Config(data="wmdp", forget_corpus=str(corpus))
    with pytest.raises(DataMissing, match="more than 50 characters, found .* none that long: .*forget_corpus=FILE"):
        unlearning.load_material(Context(None, watch=Watch(is_quiet=True)), config)
    assert asked == []


def test_a_forget_corpus_at_a_home_that_nobody_has_is_not_there():
    config = unlearning.Config(data="wmdp", forget_corpus="~nobody-here/corpus.jsonl")
    with pytest.raises(DataMissing, match="corpus at ~nobody-here/corpus.jsonl"):
        unlearning.load_material(Context(None, watch=Watch(is_quiet=True)), config)


def test_a_base_model_is_not_asked_questions(context):
    with pytest.raises(NotApplicable, match="not an instruction-tuned Gemma"):
        texts_and_exams.load_instructed(context, "google/gemma-2-2b")


def test_data_that_cannot_be_had_say_what_to_accept(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataMissing, match=r"cais/wmdp \(wmdp-bio\) cannot be loaded \(no route\).*accept its terms"):
        evaluation_data_sets.load_rows("cais/wmdp", "wmdp-bio")


def test_questions_are_read_by_their_columns(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[object, ...]] = []

    def rows_of(*names: object) -> list[dict[str, object]]:
        asked.append(names)
        return [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3}]

    loader: Callable[..., object] = rows_of
    monkeypatch.setattr(texts_and_exams, "load_rows", loader)
    (bio,), (aging,) = texts_and_exams.read_questions("wmdp-bio"), texts_and_exams.read_questions("human_aging")
    assert (bio.subject, aging.subject) == ("biology", "human aging")
    assert bio.choices[bio.answer] == "d"
    assert asked == [("cais/wmdp", "wmdp-bio"), ("cais/mmlu", "human_aging")]
