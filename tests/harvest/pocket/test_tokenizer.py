"""The bundled tokenizer: every text comes back, every byte is a token."""

import pytest
from held_out_text import held_out_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizer import SPECIAL_TOKENS, VOCABULARY, train_tokenizer, wrap_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saemill.harvest.pocket import MODEL_FOLDER, load_tokenizer

TOKENIZER = load_tokenizer()


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokenizer.decode(ids)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert round_trip(TOKENIZER, text) == text


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_come_back(raw: bytes) -> None:
    """Bytes are no text until something decodes them; latin-1 does so for all of them."""
    assert round_trip(TOKENIZER, raw.decode("latin-1")).encode("latin-1") == raw


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\n    x", "\ta \t b  ", "a\r\nb", "\x00", "e\u0301 \U0001f642", "\uff11\uff12"]
)
def test_blanks_and_oddities_come_back(text: str) -> None:
    assert round_trip(TOKENIZER, text) == text


def test_every_byte_is_a_token_and_no_token_is_unknown() -> None:
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab())
    assert TOKENIZER.unk_token is None


def test_special_tokens_have_the_ids_of_gemma() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (0, 1, 2)
    assert len(TOKENIZER) == VOCABULARY


def test_bos_comes_first_and_once() -> None:
    ids = TOKENIZER("def f():\n    return 1\n").input_ids
    assert ids[0] == TOKENIZER.bos_token_id
    assert ids.count(TOKENIZER.bos_token_id) == 1


def test_digits_stand_alone_and_indentation_is_one_token() -> None:
    assert TOKENIZER.tokenize("2048") == ["2", "0", "4", "8"]
    assert len(TOKENIZER.tokenize("\n        ")) == 1


def test_plain_auto_tokenizer_agrees() -> None:
    auto = AutoTokenizer.from_pretrained(MODEL_FOLDER, local_files_only=True)
    text = held_out_documents()[0][1]
    assert auto(text, verbose=False).input_ids == TOKENIZER(text, verbose=False).input_ids


def test_learning_is_deterministic() -> None:
    texts = [text for _, text in held_out_documents()[:4]]
    assert train_tokenizer(texts).to_str() == train_tokenizer(texts).to_str()


def test_a_tokenizer_of_little_text_still_knows_every_byte() -> None:
    small = wrap_tokenizer(train_tokenizer(["aa aa"]), context=16)
    assert round_trip(small, "ü\x00\U0001f642") == "ü\x00\U0001f642"
    assert small.convert_ids_to_tokens([0, 1, 2]) == list(SPECIAL_TOKENS)
