"""Absorption of planted SAEs, and the whole evaluation on a tiny random model."""

from __future__ import annotations

import random
import re
import string
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2ForCausalLM

from saemill.evaluate.context.context import Context
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.context.prompt_positions import Reading
from saemill.evaluate.context.write_and_read_results import Failure, Result
from saemill.evaluate.errors import NotApplicable, SettingInvalid
from saemill.evaluate.evals.absorption import evaluation as absorption
from saemill.evaluate.evals.absorption import task_and_probes
from saemill.evaluate.evals.absorption.measure_absorption import Sparse, mean_metrics, measure_letters
from saemill.evaluate.evals.absorption.task_and_probes import (
    FIRST_LETTER,
    SHAPES,
    WORD_SHAPES,
    ClassProbe,
    Half,
    Probe,
    Task,
    Training,
    WordClasses,
    longest_prompt,
    make_prompt,
    make_spots,
    word_position,
)
from saemill.evaluate.model.prefix_suffix import LanguageModel, make_language_model
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.harvest.progress import Watch
from saemill.train.sae.gates import Relu, TopK
from saemill.train.sae.model import SparseAutoencoder

LETTERS, WORDS, ABSORBED = 2, 40, 10
D = LETTERS + ABSORBED
SPARSE = Sparse(Training(batch_size=8, weight_decay=1e-6, l1_decay=0.01), max_k=5, jump=0.03)
CLASSES = WordClasses(("a", "b"), lambda word: 0, lambda word: "A", "{word}:")


def planted_residuals() -> tuple[torch.Tensor, torch.Tensor]:
    """Words of two letters; each of the first ten words with `a` has a direction of its own besides."""
    labels = torch.arange(WORDS * LETTERS) // WORDS
    x = torch.zeros(len(labels), D)
    x[torch.arange(len(labels)), labels] = 1.0
    x[torch.arange(ABSORBED), LETTERS + torch.arange(ABSORBED)] = 0.75
    return x, labels


def planted_sae(absorbs: bool, lengths: torch.Tensor | None = None) -> SparseAutoencoder:
    """A latent for each letter and one for each special word; with `absorbs` the letter's is silent on those words.
    With `lengths` its decoder rows have these, and its gate is one that takes no other codes for them."""
    W_enc, W_dec = torch.eye(D), torch.eye(D)
    if absorbs:
        W_enc[0, LETTERS:] = -2.0
        W_enc[LETTERS:, 0], W_enc[LETTERS:] = 0.0, W_enc[LETTERS:] * 1.25 / 0.75
        W_dec[LETTERS:] *= 0.6
        W_dec[LETTERS:, 0] = 0.8
    if lengths is None:
        return SparseAutoencoder(W_enc, W_dec, Relu())
    return SparseAutoencoder(W_enc / lengths[:, None], W_dec * lengths[:, None], TopK(D))


def planted_task() -> Task:
    x, labels = planted_residuals()
    reading = Reading({1: x}, {})
    half = Half([f"w{i}" for i in range(len(x))], labels, reading)
    probe = Probe(torch.eye(LETTERS, D), torch.full((LETTERS,), -0.5))
    found = torch.ones(len(x), dtype=torch.bool)
    return Task(CLASSES, half, half, {1: ClassProbe(probe, (1.0, 1.0), found)}, {1: reading})


@pytest.mark.parametrize(("absorbs", "share"), [(True, ABSORBED / WORDS), (False, 0.0)])
def test_planted_absorption_is_found_to_the_word(builder, absorbs, share):
    subject = builder.subject(planted_sae(absorbs), layers=(1,))
    a, b = measure_letters(planted_task(), subject, [0, 1], SPARSE, torch.Generator().manual_seed(0))
    assert (a.latents, b.latents) == ((0,), (1,))
    assert (a.full / a.words, a.fraction_sum / a.words) == (share, pytest.approx(share, abs=1e-6))
    assert (b.full, b.fraction_sum) == (0, 0.0)
    means = mean_metrics([a, b])
    assert means["mean_full_absorption_score"] == pytest.approx(share / 2)
    assert means["mean_num_split_features"] == 1
    assert means["std_dev_full_absorption_score"] == pytest.approx(share / 2**0.5)


def test_an_sae_is_absorbed_as_far_whatever_the_lengths_of_its_decoder_rows(builder):
    """Those of a top-k SAE from elsewhere stay as they are."""
    found, stretched = [], torch.full((D,), 0.25)
    stretched[[1, 3]] = 8.0  # of the other letter, and of a word
    for name, lengths in (("unit", torch.ones(D)), ("stretched", stretched)):
        subject = builder.subject(planted_sae(True, lengths), name, layers=(1,))
        torch.testing.assert_close(subject.sae.W_dec.norm(dim=1), lengths / lengths.mean())
        found.append(measure_letters(planted_task(), subject, [0, 1], SPARSE, torch.Generator().manual_seed(0)))
    assert [(one.latents, one.full) for one in found[0]] == [(one.latents, one.full) for one in found[1]]
    assert [one.fraction_sum for one in found[0]] == pytest.approx([one.fraction_sum for one in found[1]], abs=1e-4)


def test_words_are_encoded_once_for_the_latents_of_all_letters(builder, monkeypatch):
    asked, columns_of = [], Reading.columns_of
    monkeypatch.setattr(Reading, "columns_of", lambda *given: asked.append(given[2].tolist()) or columns_of(*given))
    subject = builder.subject(planted_sae(False), layers=(1,))
    measure_letters(planted_task(), subject, [0, 1], SPARSE, torch.Generator().manual_seed(0))
    assert len(asked) == 2 and asked[0] == asked[1] == sorted(set(asked[0]))  # of training and of test words


@pytest.mark.parametrize("train", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
def test_a_class_that_training_words_do_not_tell_from_others_is_not_known(train, monkeypatch):
    """Its latents could not be chosen: a regression needs words of both kinds."""
    reading = Reading({1: torch.eye(2).repeat(2, 1)}, {})
    halves = [Half(["w"] * 4, torch.tensor(labels), reading) for labels in (train, [0, 1, 0, 1])]
    knows_both = Probe(torch.eye(2), torch.full((2,), -0.5))
    monkeypatch.setattr(task_and_probes, "fit_probe", lambda *_: knows_both)
    assert task_and_probes._fit(1, *halves, 2, 0).known(0.0) == ([0, 1] if len(set(train)) == 2 else [])
    with pytest.raises(SettingInvalid, match="min_GT_probe_f1: expected 0 or more"):
        absorption.EVALUATION.require(absorption.Config(min_GT_probe_f1=-0.1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, world) -> LanguageModel:
    """A random model with the pocket model's tokenizer."""
    torch.manual_seed(5)
    config = Gemma2ForCausalLM.from_pretrained(world.model).config
    config.vocab_size, config.max_position_embeddings, config.sliding_window = 4096, 256, 64
    return make_language_model(Gemma2ForCausalLM(config), MODEL_FOLDER)


def test_a_prompt_is_read_at_its_words_last_token(tiny):
    words = (" self", "x")
    prompts = [make_prompt(word, list(string.ascii_letters), FIRST_LETTER, random.Random(0)) for word in words]
    for spot, word in zip(make_spots(prompts, FIRST_LETTER, tiny), words, strict=True):
        assert tiny.tokenizer.backend.decode([spot.tokens[spot.position]]).strip() == word.strip()
        assert spot.tokens[0] == tiny.bos
    assert word_position(tiny, FIRST_LETTER.template) == -6  # as with Gemma's tokenizer
    spaced = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda texts: [list(f" {text}") for text in texts]))
    assert word_position(spaced, "{word} is:") == -5  # one that begins every text with a space


def test_prompts_are_no_longer_than_the_windows_of_an_sae_that_reads_places(tiny, builder, monkeypatch):
    words, draw = absorption.vocabulary_words(tiny)[-200:], random.Random(0)
    spots = make_spots([make_prompt(word, words, WORD_SHAPES, draw) for word in words], WORD_SHAPES, tiny)
    most = max(len(spot.tokens) for spot in spots)
    assert most <= longest_prompt(words, WORD_SHAPES, tiny) <= 1.5 * most
    monkeypatch.setattr(LoadedSae, "needs", frozenset({"position"}))
    first, second = run(tiny, builder, classes="shape")
    assert all(f"trained on windows of {builder.CONTEXT}, but" in str(one.error) for one in (first, second))


def test_words_of_the_vocabulary_are_whole_tokens_in_the_order_of_their_ids(tiny):
    words = absorption.vocabulary_words(tiny)
    ids = [tiny.tokenizer.encode([word])[0] for word in words]
    assert all(len(tokens) == 1 for tokens in ids)
    assert ids == sorted(ids)
    assert " self" in words
    assert len(words) > 3000


def test_shapes():
    words = ("x", "X", "XY", " word", " Word", " W", " WORD")
    answers = [WORD_SHAPES.answer(word) for word in words]
    assert answers == ["inside", "Inside", "INSIDE", "word", "Word", "Word", "WORD"]
    assert [WORD_SHAPES.names[WORD_SHAPES.class_of(word)] for word in words] == answers
    assert len(set(SHAPES)) == 6


KNOWN = {"classes": "shape", "min_GT_probe_f1": 0.05, "min_feats_for_eval": 1}  # with which a random model knows some


def run(tiny: LanguageModel, builder, layers: tuple[int, ...] = (2, 2), **settings: object) -> list[Result | Failure]:
    """Of an SAE of each of these layers."""
    context = Context(None, model_name="tiny", watch=Watch(is_quiet=True))
    context._model = tiny
    saes = [
        builder.subject(builder.make_sae(k=None, seed=seed), f"sae{seed}", layers=(layer,))
        for seed, layer in enumerate(layers)
    ]
    config = absorption.Config(**{"max_words": 60, "llm_batch_size": 16, "k_sparse_probe_num_epochs": 3, **settings})
    return list(absorption.evaluate(context, saes, config))


def test_the_whole_evaluation_repeats_by_its_seed_and_leaks_none(tiny, builder):
    state, torch_state = random.getstate(), torch.random.get_rng_state()
    first, again = run(tiny, builder, **KNOWN), run(tiny, builder, **KNOWN)
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert [each.metrics for each in first] == [each.metrics for each in again]
    (result, _) = first
    assert result.extra["eval_type_id"] == "absorption_word_shape"
    assert result.eval_config["prompt_token_pos"] == -3
    assert 0 <= result.metrics["mean"]["mean_absorption_fraction_score"] <= 1
    assert len(result.details) >= 1
    other = run(tiny, builder, random_seed=7, **KNOWN)
    assert other[0].extra["absorption"]["probe_f1"] != result.extra["absorption"]["probe_f1"]


def test_regressions_that_ran_out_of_iterations_are_counted(tiny, builder, monkeypatch):
    fitted = task_and_probes.fitted
    monkeypatch.setattr(task_and_probes, "fitted", lambda *rows, **given: fitted(*rows, **given | {"max_iter": 1}))
    for result in run(tiny, builder, **KNOWN):
        assert re.fullmatch(r"([1-9]\d*) of \1 probes? had not converged", result.remark)


def test_a_dead_sae_does_not_pass_for_one_that_absorbs_nothing(tiny, builder, monkeypatch):
    """Its score is the best there is."""
    assert not any(result.remark and "no latent fires" in result.remark for result in run(tiny, builder, **KNOWN))
    make_sae = builder.make_sae

    def make_dead(**given):
        sae = make_sae(**given)
        sae.b_enc.data -= 1e6
        return sae

    monkeypatch.setattr(builder, "make_sae", make_dead, raising=False)
    for result in run(tiny, builder, **KNOWN):
        assert result.metrics["mean"]["mean_absorption_fraction_score"] == 0.0
        assert result.remark == "0 because no latent fires on these words"


def test_an_sae_is_asked_the_same_beside_an_sae_of_another_layer(tiny, builder):
    (alone,) = run(tiny, builder, layers=(3,), **KNOWN)
    beside = run(tiny, builder, layers=(3, 0), **KNOWN)[0]
    assert (alone.metrics, alone.details) == (beside.metrics, beside.details)


def test_a_layer_whose_probe_finds_no_word_is_a_reason_not_to_run(tiny, builder, monkeypatch):
    monkeypatch.setattr(Probe, "scores", lambda self, x: torch.full((len(x), len(self.weights)), -1.0))
    first, second = run(tiny, builder, **KNOWN)
    for failure in (first, second):
        assert isinstance(failure, Failure) and "knows 0 of 6 classes of words (none)" in str(failure.error)


def test_too_few_known_letters_are_a_reason_not_to_run(tiny, builder):
    first, second = run(tiny, builder)
    for failure in (first, second):
        assert isinstance(failure, Failure) and "20 are needed" in str(failure.error)


@pytest.mark.parametrize("template", ["what is it:", "{word} and {word}:", "{word} {letter}:", "{word} {", "{word!r}:"])
def test_a_template_without_one_place_for_the_word_is_refused(tiny, builder, template):
    with pytest.raises(SettingInvalid, match="prompt_template: expected {word} once"):
        run(tiny, builder, prompt_template=template)


def test_words_that_are_too_few_for_a_prompt_are_a_reason_not_to_run(tiny, builder):
    with pytest.raises(NotApplicable, match=r"the smaller half of 50 words has 10, but a prompt shows 10 others"):
        run(tiny, builder, max_words=50)
    assert "are needed" in str(run(tiny, builder, max_words=51)[0].error)
