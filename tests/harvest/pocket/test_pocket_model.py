"""The bundled model: what it is, what it weighs, and how well it predicts."""

import json
import re
from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from held_out_text import held_out_documents, is_held_out, without_repeats, write_held_out
from make_tokenizer import BOS
from pocket_model import make_config
from pocket_quality import join_documents, measure, unigram_entropy
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from saemill.harvest.corpus.stdlib import stdlib_documents
from saemill.harvest.pocket import MODEL_FOLDER, load_model, load_tokenizer

PACKAGE = MODEL_FOLDER.parent
RECORD = json.loads((PACKAGE / "training_curve.json").read_text())


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    """In float32: without hardware for it, bfloat16 is many times slower."""
    return load_model(torch.float32)


@pytest.fixture(scope="module")
def held_out_run() -> np.ndarray:
    texts = [text for _, text in held_out_documents()]
    return join_documents(load_tokenizer()(texts, add_special_tokens=False, verbose=False).input_ids, BOS)


def test_it_is_a_gemma_2_of_26_layers(model: Gemma2ForCausalLM) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (26, 128, 4096)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 13
    assert config.sliding_window < 128 < config.max_position_embeddings == 1024
    assert config.num_key_value_heads < config.num_attention_heads
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.query_pre_attn_scalar == config.head_dim
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_folder_holds_the_architecture_that_training_builds(model: Gemma2ForCausalLM) -> None:
    fresh = make_config().to_dict()
    kept = model.config.to_dict()
    own = {"dtype", "architectures", "_name_or_path", "transformers_version"}
    assert {k: v for k, v in kept.items() if k not in own} == {k: v for k, v in fresh.items() if k not in own}


def test_it_loads_as_it_lies_in_bfloat16() -> None:
    loaded = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, local_files_only=True)
    assert isinstance(loaded, Gemma2ForCausalLM)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert load_model(torch.float32).dtype == torch.float32


def test_what_travels_is_small_and_plain() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}


def test_sliding_layers_do_slide(model: Gemma2ForCausalLM) -> None:
    """The first layer sees 64 tokens; the second sees all."""
    window = torch.randint(3, 4096, (1, 128), generator=torch.Generator().manual_seed(0))
    changed = window.clone()
    changed[0, 1] += 1
    with torch.no_grad():
        pairs = [model(ids, output_hidden_states=True).hidden_states for ids in (window, changed)]
    assert torch.equal(pairs[0][1][0, 65:], pairs[1][1][0, 65:])
    assert not torch.equal(pairs[0][2][0, 65:], pairs[1][2][0, 65:])


@pytest.mark.parametrize("context", [128, 512])
def test_it_predicts_unseen_text_far_better_than_frequencies(
    model: Gemma2ForCausalLM, held_out_run: np.ndarray, context: int
) -> None:
    part = held_out_run[:4096]
    assert measure(model, part, BOS, context).gain >= 2.5


def test_the_gain_comes_from_order(model: Gemma2ForCausalLM, held_out_run: np.ndarray) -> None:
    shuffled = np.random.default_rng(0).permutation(held_out_run[:2048])
    assert measure(model, shuffled, BOS, 128).gain < 0


def test_it_predicts_in_bfloat16_as_in_float32(model: Gemma2ForCausalLM, held_out_run: np.ndarray) -> None:
    found, expected = (measure(one, held_out_run[:256], BOS, 128).cross_entropy for one in (load_model(), model))
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_the_record_is_what_the_files_give(held_out_run: np.ndarray) -> None:
    model = load_model()
    for recorded in RECORD["quality"]:
        again = measure(model, held_out_run, BOS, recorded["context"])
        assert again.tokens == recorded["tokens"]
        assert again.cross_entropy == pytest.approx(recorded["cross_entropy"], abs=0.01)
        assert again.unigram_entropy == pytest.approx(recorded["unigram_entropy"], abs=1e-9)


def test_the_record_claims_enough() -> None:
    assert all(one["gain"] >= 2.5 for one in RECORD["quality"])
    assert RECORD["curve"][-1]["held_out_loss"] < RECORD["curve"][0]["held_out_loss"] - 1
    assert RECORD["curve"][-1]["tokens"] == RECORD["tokens_seen"]


def test_the_card_says_what_the_record_says() -> None:
    card = (PACKAGE / "MODEL_CARD.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, flags=re.MULTILINE)
    said = {int(context): (float(ce), float(entropy), float(gain)) for context, ce, entropy, gain in rows}
    for one in RECORD["quality"]:
        expected = (one["cross_entropy"], one["unigram_entropy"], one["gain"])
        assert said[one["context"]] == pytest.approx(expected, abs=0.0051)
    assert f"{RECORD['tokens_seen'] / 1e6:.1f} million" in card
    assert RECORD["corpus"] in card


def test_the_sample_was_held_out() -> None:
    documents = held_out_documents()
    assert sum(len(text) for _, text in documents) > 100_000
    assert all(is_held_out(text) for _, text in documents)


def test_about_four_documents_in_a_hundred_are_held_out() -> None:
    verdicts = [is_held_out(f"document {i}") for i in range(20_000)]
    assert np.mean(verdicts) == pytest.approx(0.04, abs=0.005)
    here = [is_held_out(text) for _, text in stdlib_documents()]
    assert 0 < sum(here) < len(here) / 10


def test_a_repeated_document_is_no_held_out_document() -> None:
    lines = [f"this is telling line number {i} of the text\n" for i in range(10)]
    whole, half, short = "".join(lines), "".join(lines[:5]), "x = 1\n"
    fresh = whole.replace("telling", "different")
    trained = [("t", whole + short)]
    kept = without_repeats([("copy", half), ("fresh", fresh), ("short", short), ("mixed", half + fresh)], trained)
    assert [name for name, _ in kept] == ["fresh", "short", "mixed"]


def test_the_sample_file_round_trips(tmp_path: Path) -> None:
    documents = [("a", "é\n"), ("b", "")]
    write_held_out(documents, tmp_path / "x.xz")
    assert held_out_documents(tmp_path / "x.xz") == documents


def test_measure_agrees_with_one_token_at_a_time() -> None:
    torch.manual_seed(0)
    tiny = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8, attn_implementation="eager", pad_token_id=0,
        )
    ).eval()  # fmt: skip
    run = np.array([2, 5, 6, 7, 2, 9, 3, 3, 10, 4])  # two windows of 4; the rest fills none
    losses = []
    for window in (run[:4], run[4:8]):
        seen = [2]
        for target in window.tolist():
            with torch.no_grad():
                p = tiny(torch.tensor([seen])).logits[0, -1].softmax(-1)
            if target != 2:
                losses.append(-log(p[target].item()))
            seen.append(target)
    quality = measure(tiny, run, bos=2, context=4, batch=1)
    assert quality.tokens == 6
    assert quality.cross_entropy == pytest.approx(np.mean(losses), rel=1e-5)
    assert quality.unigram_entropy == pytest.approx(unigram_entropy(np.array([5, 6, 7, 9, 3, 3])))


def test_unigram_entropy_agrees_with_its_definition() -> None:
    tokens = [1, 1, 2, 7, 7, 7]
    expected = -sum(n / 6 * log(n / 6) for n in Counter(tokens).values())
    assert unigram_entropy(np.array(tokens)) == pytest.approx(expected)
