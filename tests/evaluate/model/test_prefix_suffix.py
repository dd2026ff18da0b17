"""The language model in parts, and what feeds it, against transformers' own whole model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from saemill.cache_schema import AttentionSpec, Store
from saemill.cache_schema.sites import RESID, Site
from saemill.evaluate.context.context import Context, find_model
from saemill.evaluate.errors import MemoryTooSmall, ModelMissing, NotApplicable
from saemill.evaluate.model import prefix_suffix
from saemill.evaluate.model.batches import joined, make_rows, run_windows, store_batches
from saemill.evaluate.model.prefix_suffix import LanguageModel, load_language_model
from saemill.evaluate.model.unembedding_head import Head, load_head
from saemill.harvest.model.architectures import ARCHITECTURES
from saemill.harvest.pocket import MODEL_FOLDER


@pytest.fixture
def model(world, language_model):
    return language_model(world.model)


@pytest.fixture
def whole(world):
    return Gemma2ForCausalLM.from_pretrained(world.model, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def tokens(world):
    return world.tokens[:6]


@pytest.fixture(scope="module")
def with_words(world, tmp_path_factory):
    """The world's model with a tokenizer of one token a letter beside it."""
    folder = tmp_path_factory.mktemp("words")
    for file in world.model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    names = ["<pad>", "<eos>", "<bos>", *(chr(ord("a") + n) for n in range(26))]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return load_language_model(folder, torch.float32, torch.device("cpu"))


def test_logits_are_those_of_the_whole_model(model, whole, tokens):
    expected = whole(tokens, use_cache=False).logits
    hidden = model.hidden(tokens)
    torch.testing.assert_close(model.head(hidden.flatten(0, 1)).unflatten(0, tokens.shape), expected)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_prefix_and_suffix_are_the_whole_to_the_bit(model, tokens, layer):
    resid = model.resid(tokens, (layer,))[layer]
    assert torch.equal(model.suffix(resid, layer), model.hidden(tokens))


def make_of_family(model_type):
    """Three layers for 16 tokens; where layers differ, the first sees all and the others three tokens back."""
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 3, "max_position_embeddings": 16}
    if hasattr(AutoConfig.for_model(model_type), "layer_types"):
        shape |= {"layer_types": ["full_attention", *["sliding_attention"] * 2], "sliding_window": 3}
        shape |= {"use_sliding_window": True}
    config = AutoConfig.for_model(model_type, vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), None, eos=2, pad=0)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_model_of_every_family_comes_apart_and_together_again(model_type):
    """Padded or not, and with learned positions, which are added once."""
    model, ids = make_of_family(model_type), torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :4] = False
    for layer, padding in ((0, None), (1, None), (1, valid)):
        resid = model.resid(ids, (layer,), padding)[layer]
        whole = model.stack(input_ids=ids, use_cache=False, **prefix_suffix._padding(padding)).last_hidden_state
        assert torch.equal(model.suffix(resid, layer, padding), whole)


def test_learned_positions_go_on_behind_padding_and_end_with_their_table():
    model, rows = make_of_family("gpt2"), [[5, 6, 7, 8, 9], [11, 12]]
    padded, valid = make_rows(model, rows, 5, "left")
    for row, found in zip(rows, model.complete(padded, 4, valid), strict=True):
        for token in found.tolist():
            assert token == int(model.head(model.hidden(torch.tensor([row]))[:, -1]).argmax())
            row = [*row, token]
    long = torch.full((1, 17), 5)
    for run in (lambda: model.resid(long, (0,)), lambda: model.hidden(long), lambda: model.complete(long, 1, long > 0)):
        with pytest.raises(NotApplicable, match=r"texts of at most 16 tokens, the model's positions, found 1[78]"):
            run()


def test_every_end_of_text_is_special():
    """Of a tokenizer one is known, and a model may have several."""
    model = make_of_family("gemma3_text")
    model.model.config.eos_token_id = [2, 7]
    assert {1, 2, 7} <= set(model.special)


def test_of_a_model_that_sees_the_part_that_reads_is_loaded(tmp_path):
    """Gemma-3 of 4B and more: as its files on the hub are."""
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2}
    text = AutoConfig.for_model("gemma3_text", vocab_size=40, **shape)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("gemma3", text_config=text.to_dict(), vision_config=vision)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(text, dtype=torch.float32)
    weights = {f"language_model.model.{name}": weight for name, weight in model.base_model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    found = load_language_model(tmp_path, torch.float32, torch.device("cpu"))
    whole = LanguageModel(model, None, eos=None, pad=None)
    assert torch.equal(found.head(found.hidden(ids)), whole.head(whole.hidden(ids)))
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    head = Head(model.base_model.norm, model.get_output_embeddings().weight)
    assert torch.equal(load_head(tmp_path, torch.device("cpu")).promotes(rows), head.promotes(rows))


def test_the_prefix_stops_at_its_last_layer(model, tokens, monkeypatch):
    monkeypatch.setattr(model.stack.layers[3], "forward", lambda *a, **k: pytest.fail("layer 3 was run"))
    assert model.resid(tokens, (0, 2)).keys() == {0, 2}


def test_a_splice_replaces_the_residual(model, tokens):
    resid = model.resid(tokens, (1,))[1]
    other = torch.randn(resid.shape, generator=torch.Generator().manual_seed(0))
    seen = []

    def splice(x):
        seen.append(x)
        return other

    with model.tapped({Site(RESID, 1): splice}):
        assert torch.equal(model.hidden(tokens), model.suffix(other, 1))
    assert torch.equal(seen[0], resid)
    assert torch.equal(model.suffix(resid, 1), model.hidden(tokens))  # and it is gone afterwards


def test_rows_padded_on_either_side_are_what_they_are_alone(model, tokens):
    rows = [tokens[0, :5].tolist(), tokens[1].tolist(), tokens[2, :8].tolist()]
    for padding in ("left", "right"):
        padded, valid = make_rows(model, rows, 12, padding)
        found = run_windows(model, padded, valid, (2,)).resid[2]
        for number, row in enumerate(rows):
            alone = model.resid(torch.tensor([row]), (2,))[2][0]
            torch.testing.assert_close(found[number][valid[number]], alone, rtol=1e-4, atol=1e-4)


def test_continuations_are_those_of_transformers(model, whole, tokens):
    rows = [tokens[0, :5].tolist(), tokens[1, :9].tolist()]
    padded, valid = make_rows(model, rows, 9, "left")
    found = model.complete(padded, 4, valid)
    for row, continuation in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        for token in continuation:
            assert int(whole(ids, use_cache=False).logits[0, -1].argmax()) == int(token)
            ids = torch.cat([ids, token.view(1, 1)], dim=1)


def test_attention_of_the_layer_above(model, whole, tokens):
    """The probabilities of layer 3 from the residual after layer 2."""
    expected = whole(tokens, output_attentions=True, use_cache=False).attentions[3]
    blocks = []
    model.attention(model.resid(tokens, (2,))[2], 2, blocks.append)
    torch.testing.assert_close(torch.cat(blocks), expected, rtol=1e-4, atol=1e-5)


def windows_of(model, texts, attention=None):
    return run_windows(model, *make_rows(model, model.token_rows(texts), 4), (1,), attention)


def test_text_gets_a_bos_and_is_cut(with_words):
    batches = [windows_of(with_words, texts) for texts in (["abc", "abcdefgh"], [""])]
    assert [batch.tokens.tolist() for batch in batches] == [[[2, 3, 4, 5], [2, 3, 4, 5]], [[2, 0, 0, 0]]]
    assert batches[0].keep.tolist() == [[False, True, True, True]] * 2
    assert batches[1].valid.tolist() == [[True, False, False, False]]
    assert with_words.bos == 2
    assert set(with_words.special) == {0, 1, 2}


def test_attention_rows_come_along(with_words):
    """Sparsified as in a store; of a mass of one, dense rows again."""
    spec = AttentionSpec(layers=(1, 2), heads=1, averaged=True, topk=4, mass=1.0)
    batch = windows_of(with_words, ["abc", "zyx"], spec)
    assert batch.attention.keys() == {1, 2}
    dense = []
    with_words.resid(batch.tokens, (1,), sinks={2: dense.append})
    mean = torch.cat(dense).mean(1)
    rows = batch.attention[2]
    query = torch.arange(len(rows.indptr) - 1).repeat_interleave(rows.indptr.diff())
    found = torch.zeros(8, 4).index_put((query, rows.indices), rows.data).view(2, 4, 4)
    torch.testing.assert_close(found, mean, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("size", [1, 3, 7, 8, 50])
@pytest.mark.parametrize(("first", "count"), [(0, None), (2, 13), (5, 0), (19, 9)])
def test_batches_of_a_split_are_its_windows_in_order(world, builder, size, first, count):
    """Across shards of seven windows, with attention and documents."""
    with Store.open(world.store) as store:
        begin, end = store.manifest.splits["test"]
        batches = list(store_batches(store, "test", (builder.LAYER,), (builder.LAYER,), size, first, count))
        stop = end if count is None else min(begin + first + count, end)
        expected = list(range(begin + first, stop))
        assert sum(map(len, batches)) == len(expected)
        assert all(len(batch) == size for batch in batches[:-1])
        if expected:
            whole = joined(batches)
            assert torch.equal(whole.tokens, world.tokens[expected])
            assert torch.equal(whole.resid[builder.LAYER].float(), world.resid[expected])
            assert whole.documents[:, 0].tolist() == [n // 2 for n in expected]


def test_a_slice_of_a_batch_has_its_own_attention(world, builder):
    with Store.open(world.store) as store:
        layer = builder.LAYER
        (batch,) = store_batches(store, "test", (layer,), (layer,), 20)
        (expected,) = store_batches(store, "test", (layer,), (layer,), 3, first=4, count=3)
        piece = batch.slice(4, 7)
        for name in ("indptr", "indices", "data", "kept_mass"):
            assert torch.equal(getattr(piece.attention[layer], name), getattr(expected.attention[layer], name)), name
        assert torch.equal(piece.tokens, expected.tokens)


def test_another_revision_is_another_model(world):
    with Store.open(world.store) as store:
        manifest = store.manifest
    assert find_model(manifest, None).folder == world.model
    other = replace(manifest, model=replace(manifest.model, revision="sha256-0"))
    with pytest.raises(ModelMissing, match="with which the store was made, found .*--model"):
        find_model(other, None)
    with pytest.raises(ModelMissing, match="give --cache or --model"):
        find_model(None, None)


def test_a_model_that_cannot_be_had_is_asked_for_once(make_world, open_context):
    context = open_context(make_world(model_id="nobody/has-this"))
    for _ in range(2):
        with pytest.raises(ModelMissing, match="--model"):
            _ = context.model


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", "{}"),
        ("model.safetensors", None),
        ("model.safetensors", "x"),
        ("generation_config.json", '{"early_stopping": "x"}'),
    ],
)
def test_a_damaged_model_is_named(world, tmp_path, file, content):
    for part in world.model.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(ModelMissing):
        load_language_model(tmp_path, torch.float32, torch.device("cpu"))


def test_missing_weights_are_never_filled_in(world, tmp_path):
    """transformers would invent them."""
    for part in world.model.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] += ["full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelMissing, match="missing"):
        load_language_model(tmp_path, torch.float32, torch.device("cpu"))


def test_a_model_that_does_not_fit_is_not_called_damaged(world, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for owner, name in ((AutoModelForCausalLM, "from_pretrained"), (PreTrainedModel, "to")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(MemoryTooSmall, match="does not fit"):
                load_language_model(world.model, torch.float32, torch.device("cpu"))


def test_a_model_that_does_not_fit_is_tried_once(world, open_context, monkeypatch):
    """It takes minutes, for every SAE and evaluation; its head and tokenizer are there all the same."""
    tried, context = [], open_context(world)

    def refuse(*_):
        tried.append(1)
        raise MemoryTooSmall("the model does not fit")

    monkeypatch.setattr("saemill.evaluate.context.context.load_language_model", refuse)
    for _ in range(2):
        with pytest.raises(MemoryTooSmall, match="does not fit"):
            _ = context.model
    assert len(tried) == 1 and context.head


def test_no_store_is_said_in_words():
    with pytest.raises(Exception, match="give --cache"):
        _ = Context(None).store


def test_the_pocket_model_knows_nothing_without_its_residual():
    """All tokens equally likely: the loss under zero ablation is the logarithm of the vocabulary."""
    model = load_language_model(MODEL_FOLDER, torch.bfloat16, torch.device("cpu"))
    hidden = model.suffix(torch.zeros(1, 4, model.facts.d_model, dtype=model.dtype), 19)
    assert (model.head(hidden[0]) == 0).all()
    assert model.facts.vocab_size == 4096
    assert model.tokenizer.encode(["def f(x):"])[0]


def test_a_tokenizer_that_cannot_be_taken_says_what_to_do(world, tmp_path):
    folder = shutil.copytree(world.model, tmp_path / "model")
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    fast.save_pretrained(folder)
    with pytest.raises(ModelMissing, match="Set `bos_token` in its tokenizer_config.json"):
        _ = load_language_model(folder, torch.float32, torch.device("cpu")).tokenizer
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelMissing, match="has no tokenizer that can be loaded"):
        _ = load_language_model(folder, torch.float32, torch.device("cpu")).tokenizer
