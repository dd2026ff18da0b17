"""Multiple choice as it is asked, letters as they are read, rows as they are cut."""

from __future__ import annotations

import random

import pytest
import torch

from saemill.evaluate.errors import DataMissing
from saemill.evaluate.evals.unlearning.exams import (
    ALL_ORDERS,
    Exam,
    Question,
    letter_sheets,
    letters_chosen,
    most_likely,
    next_token_sheets,
)
from saemill.evaluate.evals.unlearning.texts_and_exams import joined_rows, sampled_texts

QUESTION = Question("human aging", "How old?", ("one", "two", "three", "four"), answer=2)


def test_the_prompt_letter_for_letter():
    assert QUESTION.prompt() == (
        "<bos><start_of_turn>user\n"
        "The following are multiple choice questions (with answers) about human aging.\n"
        "How old?\nA. one\nB. two\nC. three\nD. four<end_of_turn>\n<start_of_turn>model\nAnswer: ("
    )


def test_the_right_letter_moves_with_the_choices():
    assert len(set(ALL_ORDERS)) == 24
    for order in ALL_ORDERS:
        letter = "ABCD"[order.index(QUESTION.answer)]
        assert f"\n{letter}. three" in QUESTION.prompt(order)


def test_a_letter_may_be_spelled_with_or_without_a_space():
    letters = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])  # "A" to "D", " A" to " D"
    logits = torch.tensor([[0.0, 1, 0, 0, 0, 0, 3, 0, 9], [0, 2, 0, 0, 1, 1, 1, 1, 9]])
    assert letters_chosen(letters, torch.float32)(logits).tolist() == [2, 1]


def test_probabilities_that_tie_in_bfloat16_go_to_the_first_letter():
    letters = torch.tensor([[0, 1, 2, 3]])
    logits = torch.tensor([[2.0, 2.001, 1.0, 1.0]])
    assert letters_chosen(letters, torch.bfloat16)(logits).tolist() == [0]
    assert letters_chosen(letters, torch.float32)(logits).tolist() == [1]


def test_prompts_are_padded_on_the_right_and_asked_at_their_end():
    (first, last) = letter_sheets([[5, 6, 7], [8], [9, 9]], [0, 1, 2], pad=0, batch_size=2)
    assert first.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert first.positions.tolist() == [2, 0]
    assert last.answers.tolist() == [2]
    hidden = torch.arange(6).view(2, 3, 1)
    assert hidden[first.rows, first.positions].view(-1).tolist() == [2, 3]


def test_plain_text_asks_for_every_next_token_that_is_not_special():
    (sheet,) = next_token_sheets(torch.tensor([[2, 5, 1, 6], [2, 7, 8, 0]]), special=(0, 1, 2), batch_size=8)
    asked = list(zip(sheet.rows.tolist(), sheet.positions.tolist(), sheet.answers.tolist(), strict=True))
    assert asked == [(0, 0, 5), (0, 2, 6), (1, 0, 7), (1, 1, 8)]
    chosen = Exam("text", (sheet,), most_likely).only([torch.tensor([False, True, False, True])])
    assert chosen.sheets[0].answers.tolist() == [6, 8]
    assert len(chosen) == 2


class Characters:
    """A token for each character."""

    def encode(self, texts):
        return [[ord(character) for character in text] for text in texts]


def test_rows_are_cut_from_the_joined_text_and_start_with_bos():
    texts = ["abcd" * 10, "wxyz" * 10]
    rows = joined_rows(texts, Characters(), eos_text="|", bos=1, pad=ord("b"), length=7)
    whole = "|".join(texts)
    chunks = [whole[i : i + 5] for i in range(0, 100, 5)]  # 81 characters in 20 chunks of 5, the last ones empty
    stream = [token for chunk in chunks for token in [1, *map(ord, chunk)] if token != ord("b")]
    expected = [[1, *stream[i + 1 : i + 7]] for i in range(0, len(stream) - 6, 7)]
    assert rows.tolist() == expected


@pytest.mark.parametrize(("texts", "found"), [(["abcd"], 24), ([], 0)])
def test_a_text_that_fills_no_row_is_refused(texts, found):
    with pytest.raises(DataMissing, match=f"at least one row of 25 tokens, found {found}: .*forget_corpus=FILE"):
        joined_rows(texts, Characters(), eos_text="|", bos=1, pad=0, length=25)


def test_draws_use_their_own_generator():
    state = random.getstate()
    texts = sampled_texts([str(i) for i in range(9)], 4, random.Random(42))
    assert len(set(texts)) == 4
    assert random.getstate() == state
    random.seed(42)
    assert texts == random.sample([str(i) for i in range(9)], 4)  # the draw of a seeded global generator
    random.setstate(state)
