"""Material: a topic of the installed library, and the protocol's own; every draw is the seed's."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from transformers import Gemma2ForCausalLM

from saemill.evaluate.context.context import Context
from saemill.evaluate.errors import DataMissing, NotApplicable
from saemill.evaluate.evals.unlearning import evaluation as unlearning
from saemill.evaluate.evals.unlearning import texts_and_exams
from saemill.evaluate.evals.unlearning.interventions import Sweep
from saemill.evaluate.evals.unlearning.texts_and_exams import EXAM_ROWS, load_topic, make_material
from saemill.evaluate.model.prefix_suffix import LanguageModel, make_language_model
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.harvest.progress import Watch


@pytest.fixture(scope="module")
def tiny(world) -> LanguageModel:
    """A random model with the pocket model's tokenizer."""
    config = Gemma2ForCausalLM.from_pretrained(world.model).config
    config.vocab_size = 4096
    torch.manual_seed(2)
    return make_language_model(Gemma2ForCausalLM(config), MODEL_FOLDER)


def texts(word: str, count: int) -> list[str]:
    return [f"{word}{number} " * 60 for number in range(count)]


def text_of(model: LanguageModel, rows: torch.Tensor) -> str:
    return model.tokenizer.backend.decode(rows.reshape(-1).tolist())


def test_latents_are_chosen_and_exams_set_on_different_texts(tiny):
    made = make_material(tiny, "tiny", texts("in", 9), texts("out", 9), "topic", seed=0)
    (forget,), (retain,) = made.forget, made.retain
    assert (forget.name, retain.name) == ("topic", "not topic")
    for rows, paper, word in ((made.forget_rows, forget, "in"), (made.retain_rows, retain, "out")):
        chosen_on, examined = ({text[:4] for text in text_of(tiny, each).split()} for each in (rows, paper.rows))
        numbers = [
            {part for part in parts if part in {f"{word}{i}" for i in range(9)}} for parts in (chosen_on, examined)
        ]
        assert numbers[0]
        assert numbers[1]
        assert not numbers[0] & numbers[1]
        assert bool((rows[:, 0] == tiny.bos).all())


def test_draws_are_the_seeds_and_leak_nothing(tiny):
    state, torch_state = random.getstate(), torch.random.get_rng_state()
    first, again, other = (
        make_material(tiny, "tiny", texts("in", 9), texts("out", 9), "topic", seed).forget_rows for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_the_library_has_the_default_topic_and_others_are_refused_by_name(tiny):
    made = load_topic(tiny, "tiny", unlearning.Config().topic, seed=0)
    assert len(made.forget[0].rows) == len(made.retain[0].rows) == EXAM_ROWS
    assert "asyncio" in made.name
    with pytest.raises(DataMissing, match="under 'nonsense'.*asyncio, email or xml"):
        load_topic(tiny, "tiny", "nonsense", seed=0)


def repetitive_documents() -> list[tuple[str, str]]:
    """Text that a model knows which says its last token again."""
    words = ("self", "return", "import", "None", "class", "def", "if", "else", "for", "in", "not", "and")
    return [(f"{'email' if i % 2 else 'other'}/{i}.py", f" {word}" * 400) for i, word in enumerate(words)]


@pytest.fixture
def echo(tiny) -> LanguageModel:
    """Its layers add nothing, so with tied embeddings the likeliest token is often the last one."""
    model = copy.deepcopy(tiny.model)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.fill_(-1.0)
        layer.post_feedforward_layernorm.weight.data.fill_(-1.0)
    return make_language_model(model, MODEL_FOLDER)


def test_the_evaluation_runs_on_it(echo, builder, monkeypatch):
    monkeypatch.setattr(texts_and_exams, "stdlib_documents", repetitive_documents)
    context = Context(None, model_name="echo", watch=Watch(is_quiet=True))
    context._model = echo
    subject = builder.subject(builder.make_sae(k=None))
    config = unlearning.Config(data="stdlib", topic="email", multipliers=(5,), n_features_list=(3,))
    (result,) = unlearning.evaluate(context, [subject], config)
    assert 0 <= result.metrics["unlearning"]["unlearning_score"] <= 1
    assert result.eval_config["dataset_names"] == ["email", "not email"]
    assert [run["multiplier"] for run in result.extra["unlearning"]["runs"]] == [5, 5]


def test_a_model_that_knows_nothing_of_it_is_not_run(tiny, builder):
    context = Context(None, model_name="tiny", watch=Watch(is_quiet=True))
    context._model = tiny
    with pytest.raises(NotApplicable, match="correctly answers no question about what it is to forget"):
        list(unlearning.evaluate(context, [builder.subject(builder.make_sae())], unlearning.Config(data="stdlib")))


def test_the_protocols_material_is_put_together_from_its_parts(tiny, tmp_path, monkeypatch):
    corpus = tmp_path / "bio.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"virus {number} " * 20}) + "\n" for number in range(30)))
    question = {"question": "what?", "choices": ["a", "b", "c", "d"], "answer": 1}

    def load_rows(name: str, _part: str) -> list[dict[str, object]]:
        return [{"text": "plain " * 40}, {"text": "short"}] * 8 if "wikitext" in name else [question] * 3

    monkeypatch.setattr(texts_and_exams, "load_rows", load_rows)
    monkeypatch.setattr(texts_and_exams, "load_instructed", lambda context, name: tiny)
    names = (*unlearning.Config().dataset_names, "college_biology")
    config = unlearning.Config(data="wmdp", forget_corpus=str(corpus), dataset_names=names, dataset_size=10, seq_len=16)
    made = unlearning.load_material(Context(None, watch=Watch(is_quiet=True)), config)
    assert made.forget_rows.shape == (10, 16)
    assert "virus" in text_of(tiny, made.forget_rows)
    assert "plain" in text_of(tiny, made.retain_rows)
    assert [paper.name for paper in made.papers] == list(names)
    assert [paper.name for paper in made.forget] == ["wmdp-bio"]
    assert [paper.name for paper in made.only_reported] == ["college_biology"]
    assert made.sweep == Sweep((0.001, 0.01), (10, 20), (25, 50, 100, 200))
    sheet = made.papers[0].trial().sheets[0]
    assert len(made.papers[0].trial()) == 3 * 24
    assert (sheet.tokens == tiny.bos).sum(1).tolist() == [1] * len(sheet.tokens)  # the template has its own
    assert len(sheet.tokens) == 2 * config.llm_batch_size
