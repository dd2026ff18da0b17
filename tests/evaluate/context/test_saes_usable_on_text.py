"""An SAE that reads attention gives on text what it gives on the same tokens in the store."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2ForCausalLM

from saemill.evaluate.context.context import Context
from saemill.evaluate.context.prompt_positions import Reader, Spot
from saemill.evaluate.context.saes_usable_on_text import attention_of, split_fitting
from saemill.evaluate.errors import DataMissing, NotApplicable
from saemill.evaluate.evals.probing.draw_classes import Task
from saemill.evaluate.evals.probing.pooled_features import pool_task
from saemill.evaluate.evals.sparse_probing_sae_probes import read_prompts
from saemill.evaluate.model.batches import store_batches
from saemill.evaluate.model.prefix_suffix import LanguageModel
from saemill.harvest.model.tokenizer import TextEncoder
from saemill.train.kit.variant_registry import config_type
from saemill.train.sae.attention.attention_links import LINK_SIDE_INPUTS


class Numbers:
    """A tokenizer's backend: each word is a token's id."""

    def encode_batch_fast(self, texts, add_special_tokens):
        return [SimpleNamespace(ids=list(map(int, text.split()))) for text in texts]


@pytest.fixture
def context(world, open_context):
    made = open_context(world)
    model = Gemma2ForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16)
    made._model = LanguageModel(model, TextEncoder(Numbers(), 2, (0, 1, 2)), eos=1, pad=0)
    return made


@pytest.fixture
def subject(builder):
    """Its codes are moved by attention at least as much as by the token itself."""
    config = config_type("attention")(
        base="standard", width=builder.F, layer=builder.LAYER, guidance="encode", rank=builder.D
    )
    sae = config.build(builder.D).sae
    torch.nn.init.normal_(sae.U, generator=torch.Generator().manual_seed(5))
    plain = builder.subject(builder.make_sae())
    settings = {"metadata": {"training_architecture_details": asdict(config)}}
    return replace(plain, read=lambda: sae, variant="attention", config=settings)


@pytest.fixture
def stored(context, subject):
    """Windows of ordinary tokens behind BOS, and the SAE's activations there, from the store."""
    assert subject.attention_layers == subject.layers
    (batch,) = store_batches(context.store, "test", subject.layers, subject.attention_layers, batch_windows=20)
    whole = (batch.keep.sum(1) == batch.context - 1).nonzero()[:, 0]
    assert len(whole) > 5
    return batch.tokens[whole], subject.encode(batch)[whole]


def close(found, expected):
    """Attention is stored in half precision."""
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float32), expected, rtol=2e-3, atol=2e-3)


def written(tokens):
    return [" ".join(map(str, row[1:])) for row in tokens.tolist()]


def test_at_a_token_of_a_prompt(context, subject, stored):
    tokens, acts = stored
    reader = Reader(context.model, [subject], attention_of(context, [subject]), batch_size=4)
    read = reader.read([Spot(row, -3) for row in tokens.tolist()], lambda _: None)
    close(read.acts_of(subject, torch.arange(len(tokens))), acts[:, -3])


def test_at_the_last_token_of_a_prompt(context, subject, stored):
    tokens, acts = stored
    _, latents = read_prompts(context, [subject], "t", tokens.tolist(), batch_size=4)
    close(latents[subject].toarray(), acts[:, -1])


def test_averaged_over_a_text(context, subject, stored):
    tokens, acts = stored
    texts = {"texts": written(tokens)}
    pool = pool_task(context, [subject], Task("t", texts, texts), tokens.shape[1], batch_size=4)
    expected = acts.sum(1) / (tokens.shape[1] - 1)
    close(pool.whole.latents[subject].toarray(), expected)


def test_who_reads_attention_where_there_is_no_store_costs_the_others_nothing(context, subject, builder):
    plain = builder.subject(builder.make_sae(), "plain")
    fitting, (failure,) = split_fitting(Context(None), [subject, plain], context.model, lambda: 0)
    assert fitting == [plain] and failure.subject is subject and isinstance(failure.error, DataMissing)


def test_texts_are_no_longer_than_the_windows_of_an_sae_that_reads_places(context, builder, subject, monkeypatch):
    """It looks them up in a table, or has never seen them; links that are a control only count them."""
    sizes = {"plain": 8, "fits": 9, "short": 8}
    plain, *places = (builder.subject(builder.make_sae(), name, context_size=sizes[name]) for name in sizes)
    for each in places:
        monkeypatch.setattr(each.sae, "needs_side", ("position",))
    linked = replace(subject, config={"metadata": {**subject.metadata, "context_size": 8}})
    monkeypatch.setattr(linked.sae, "needs_side", ("attention", "row_of", *LINK_SIDE_INPUTS["nearest"]))
    asked = []
    found, (failure,) = split_fitting(context, [plain, *places, linked], context.model, lambda: asked.append(1) or 9)
    assert found == [plain, places[0], linked] and failure.subject is places[1]
    assert isinstance(failure.error, NotApplicable)
    assert "windows of 8, but a text of this evaluation has up to 9 tokens" in str(failure.error)
    assert split_fitting(context, [plain], context.model, lambda: asked.append(1) or 9) == ([plain], [])
    assert asked == [1]  # to count tokens takes a while


def test_a_store_without_attention_is_no_store_for_an_sae_that_reads_it(make_world, open_context, subject):
    with pytest.raises(DataMissing, match="reads attention, but the store holds none"):
        attention_of(open_context(make_world(attention_layers=())), [subject])
