"""Loading, facts, truncation, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from saemill.cache_schema import Site
from saemill.harvest.capture import run
from saemill.harvest.errors import (
    ContextTooLong,
    LayerOutOfRange,
    ModelUnavailable,
    TokenizerUnsuitable,
    UnsupportedArchitecture,
    WeightsIncomplete,
)
from saemill.harvest.model.architectures import ARCHITECTURES, LLAMA_STYLE
from saemill.harvest.model.load_and_truncate import ModelFacts, Wanted, find_weights, load_model, read_facts, truncate
from saemill.harvest.model.tokenizer import load_encoder
from saemill.harvest.pocket import MODEL_FOLDER

IDS = torch.arange(3, 15).view(2, 6)
PLACE = Site("resid", 2)
RESID_2 = Wanted(resid_layers=(2,))
RESID_2_AND_ONE_ABOVE = Wanted(resid_layers=(2,), attention_layers=(0, 1, 2, 3))


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    """A saved Gemma-2 of five layers, in three files."""
    folder = tmp_path_factory.mktemp("gemma2")
    make_model("gemma2").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def called_modules(model, ids) -> list[str]:
    """Names of all modules of a truncated model that a pass calls."""
    calls: list[str] = []
    for name, module in model.stack.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: calls.append(name))
    run(model, ids, {})
    return calls


def test_facts_come_from_the_configuration(folder):
    expected = ModelFacts(
        "gemma2", num_layers=5, d_model=32, num_heads=4, max_context=64, vocab_size=60, num_key_heads=2, head_width=8
    )
    assert read_facts(folder) == expected


@pytest.mark.parametrize(
    ("resid", "attention", "whole", "loaded"),
    [
        ((19,), (17, 18, 19, 20), 20, 21),
        ((19,), (), 20, 20),
        ((3, 19), (17,), 20, 20),
        ((), (0,), 0, 1),
        ((2,), (5,), 5, 6),
    ],
)
def test_how_many_layers_are_needed(resid, attention, whole, loaded):
    wanted = Wanted(resid, attention)
    assert (wanted.whole_layers, wanted.num_layers) == (whole, loaded)


@pytest.mark.parametrize("wanted", [RESID_2, RESID_2_AND_ONE_ABOVE], ids=["resid", "attention above"])
def test_a_loaded_model_computes_what_the_cut_one_does(folder, make_model, wanted):
    cut, loaded = truncate(make_model("gemma2"), wanted), load_model(folder, wanted, torch.float32)
    assert torch.equal(run(loaded, IDS, {})[PLACE], run(cut, IDS, {})[PLACE])
    names = [name for name, _ in loaded.stack.named_parameters()]
    assert names == [name for name, _ in cut.stack.named_parameters()]
    assert loaded.facts == cut.facts == read_facts(folder)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model."])
def test_of_a_model_that_sees_the_part_that_reads_is_run(make_model, tmp_path, prefix):
    """Whichever way its weights are called: as transformers 5 has them, as on the hub, as transformers saves them."""
    text, folder = make_model("gemma3_text"), tmp_path / "seeing"
    text.save_pretrained(tmp_path / "text")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text.config.to_dict(), vision_config=vision)
    config.save_pretrained(folder)
    weights = {f"{prefix}{name}": weight for name, weight in text.base_model.state_dict().items()}
    save_file(weights | {"vision_tower.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    places = [load_model(place, RESID_2_AND_ONE_ABOVE, torch.float32) for place in (folder, tmp_path / "text")]
    assert places[0].facts == places[1].facts == read_facts(folder)
    assert torch.equal(*(run(model, IDS, {})[PLACE] for model in places))


def test_the_model_runs_in_the_dtype_asked_for(folder):
    assert run(load_model(folder, RESID_2, torch.bfloat16), IDS, {})[PLACE].dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_only_what_is_wanted_is_in_memory(make_model, tmp_path, model_type):
    make_model(model_type).save_pretrained(tmp_path)
    stack = load_model(tmp_path, RESID_2_AND_ONE_ABOVE, torch.float32).stack
    shapes = {name: tuple(parameter.shape) for name, parameter in stack.named_parameters()}
    of_4, of_5 = (f"{ARCHITECTURES[model_type].layers}.{layer}." for layer in (3, 4))
    above = {name.removeprefix(of_4): shape for name, shape in shapes.items() if name.startswith(of_4)}
    assert not any(name.startswith((of_5, "norm", "final_layer_norm", "ln_f", "lm_head")) for name in shapes)
    allowed = ("input_layernorm.", "attention.q_", "attention.k_", "attention.query_key_value.", "attention.c_attn.")
    assert above
    assert all(name.startswith(allowed) for name in above)
    fused = above.get("attention.query_key_value.weight")
    assert fused in (None, (64, 32)), "queries and keys of 32 channels each, no values"
    assert above.get("attention.c_attn.weight") in (None, (32, 64))


def test_a_pass_calls_no_more_than_it_must(make_model):
    model = make_model("gemma2")
    whole_layer = [name for name, _ in model.model.layers[0].named_modules(prefix="layers.0")]
    calls = called_modules(truncate(model, RESID_2_AND_ONE_ABOVE), IDS)
    assert len(calls) == len(set(calls))
    expected = {"", "embed_tokens", "rotary_emb", "norm"}  # `norm` is an identity by now
    expected |= {name.replace("layers.0", f"layers.{layer}") for layer in range(3) for name in whole_layer}
    expected |= {f"layers.3{part}" for part in ("", ".input_layernorm", ".attention")}
    expected |= {f"layers.3.attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert set(calls) == expected
    kinds = {name: type(module).__name__ for name, module in model.model.named_modules()}
    assert [kinds[name] for name in ("norm", "layers.3.attention.v_proj", "layers.3.attention.o_proj")] == [
        "Identity",
        "NoValues",
        "Identity",
    ]


def test_loading_says_nothing_about_what_was_left_out_and_keeps_the_verbosity(folder, capfd):
    logger = logging.getLogger("transformers")
    before = logger.level
    load_model(folder, RESID_2)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    assert logger.level == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted((5,)), "residual of layer 5: the model has layers 0 to 4.*--resid-layers"),
        (Wanted((4,), (2, 3, 4, 5)), "attention of layer 5: the model has layers 0 to 4.*--attention-layers"),
        (Wanted((-1,)), "residual of layer -1"),
        (Wanted(), "no residual, hook or attention layer"),
    ],
)
def test_layers_that_do_not_exist(folder, make_model, wanted, message):
    with pytest.raises(LayerOutOfRange, match=message):
        load_model(folder, wanted)
    with pytest.raises(LayerOutOfRange, match=message):
        truncate(make_model("llama"), wanted)


def test_a_context_beyond_the_model(folder):
    facts = read_facts(folder)
    facts.validate_context(64)
    with pytest.raises(ContextTooLong, match=r"context 65: .* at most 64"):
        facts.validate_context(65)


def test_an_unknown_architecture_is_told_what_is_supported(tmp_path):
    AutoConfig.for_model("opt").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=r"'opt' .* gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama"):
        read_facts(tmp_path)


def test_a_gpt2_that_makes_its_attention_otherwise_is_refused(tmp_path):
    AutoConfig.for_model("gpt2", reorder_and_upcast_attn=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="reorder_and_upcast_attn, .* is not supported"):
        read_facts(tmp_path)


def test_code_that_comes_with_a_model_is_never_asked_for(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedArchitecture, match="'mine'"):
        read_facts(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_refused_and_nobody_is_asked(tmp_path, monkeypatch):
    """A folder of a tokenizer alone: transformers would ask at a terminal, and a yes would run it."""
    (tmp_path / "tokenizer.json").write_text((MODEL_FOLDER / "tokenizer.json").read_text())
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(TokenizerUnsuitable, match="no tokenizer that can be loaded"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_text_is_split_as_tokenizer_json_says_whatever_class_is_named_beside_it(named, tmp_path):
    """Classes of transformers that have rules of their own put these in place of the file's."""
    rules = json.loads((MODEL_FOLDER / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    rules["normalizer"] = {"type": "Lowercase"}
    rules["pre_tokenizer"]["pretokenizers"] = [{"type": "Digits", "individual_digits": True}, byte_level]
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    said = {"tokenizer_class": named, "bos_token": "<bos>", "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    text, encoder = "In  1234 It's", load_encoder(tmp_path)
    published = Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    assert encoder.encode([text]) == [published.encode(text, add_special_tokens=False).ids]
    assert encoder.bos_token == 2 and {1, 2} <= set(encoder.special_tokens)


def test_files_whose_fields_are_no_model_and_no_tokenizer(tmp_path):
    config = json.loads((MODEL_FOLDER / "config.json").read_text()) | {"num_hidden_layers": "26"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match=r"config\.json cannot be read"):
        read_facts(tmp_path)
    tokenizer = json.loads((MODEL_FOLDER / "tokenizer.json").read_text())
    del tokenizer["added_tokens"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_bytes((MODEL_FOLDER / "config.json").read_bytes())
    with pytest.raises(TokenizerUnsuitable, match="no tokenizer that can be loaded"):
        load_encoder(tmp_path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"config\.json is missing. Expected the folder"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    "content", [b'{"model_type": "gem', b"\xff\xfe\x00", b"[]"], ids=["cut off", "not text", "no object"]
)
def test_a_damaged_configuration(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"config\.json is damaged"):
        read_facts(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "3"])
def test_a_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors\.index\.json is damaged"):
        find_weights(tmp_path)


@pytest.fixture
def broken(make_model, tmp_path):
    make_model("gemma2").save_pretrained(tmp_path, max_shard_size="40KB")
    return tmp_path


def test_a_missing_weights_file(broken):
    next(broken.glob("model-00002*")).unlink()
    with pytest.raises(WeightsIncomplete, match=r"expected model\.safetensors, or"):
        load_model(broken, RESID_2)


def test_one_whole_file_beside_an_index_is_what_is_loaded_and_what_is_named(broken, make_model):
    """As a model that is saved in one piece into a folder that held it in several; transformers takes that first."""
    file = broken / "model.safetensors"
    save_file({name: 2 * weight for name, weight in make_model("gemma2").state_dict().items()}, file)
    assert find_weights(broken) == [file]
    stack = load_model(broken, RESID_2, torch.float32).stack
    assert torch.equal(stack.embed_tokens.weight, 2 * make_model("gemma2").model.embed_tokens.weight)
    next(broken.glob("model-00002*")).unlink()
    assert find_weights(broken) == [file]


def test_weights_that_a_configuration_names_are_not_loaded_in_place_of_those_that_are_hashed(make_model, tmp_path):
    model = make_model("gemma2")
    model.save_pretrained(tmp_path)
    save_file({name: 2 * weight for name, weight in model.state_dict().items()}, tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    stack = load_model(tmp_path, RESID_2, torch.float32).stack
    assert torch.equal(stack.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("said", "name"), [({"quant_method": "gptq", "bits": 4}, "gptq"), ("awq", "awq"), (None, None)]
)
def test_quantised_weights_are_refused_by_their_configuration_alone(broken, said, name):
    """transformers would ask for packages of others, after the corpus was tokenised."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    for file in broken.glob("*.safetensors"):
        file.unlink()
    with nullcontext() if name is None else pytest.raises(UnsupportedArchitecture, match=f"quantised .*: {name}"):
        read_facts(broken)


@pytest.mark.parametrize("error", [ImportError("it takes another package"), ValueError("of no such kind")])
def test_what_transformers_raises_over_weights_names_the_folder(broken, monkeypatch, error):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(AutoModel, "from_pretrained", refuse)
    with pytest.raises(ModelUnavailable, match=re.escape(f"{broken}: transformers cannot load it ({error})")):
        load_model(broken, RESID_2)


def test_a_truncated_weights_file(broken):
    file = next(broken.glob("model-00001*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsIncomplete, match="damaged"):
        load_model(broken, RESID_2)


def test_weights_that_the_files_do_not_hold(broken):
    """transformers would fill them with random numbers."""
    index_file = broken / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    file = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != file}
    index_file.write_text(json.dumps(index))
    with pytest.raises(WeightsIncomplete, match="weights are missing"):
        load_model(broken, RESID_2)


def test_weights_of_another_shape(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(WeightsIncomplete, match="have another shape"):
        load_model(broken, RESID_2)


def test_a_decoder_of_another_build_is_refused_by_what_it_lacks(monkeypatch):
    """An entry alone makes no OPT a Llama."""
    shape = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 2}
    config = AutoConfig.for_model("opt", num_hidden_layers=2, vocab_size=20, **shape)
    monkeypatch.setitem(ARCHITECTURES, "opt", LLAMA_STYLE)
    with pytest.raises(UnsupportedArchitecture, match=r"OPTModel has no layers, norm; it has decoder"):
        truncate(AutoModelForCausalLM.from_config(config), Wanted(resid_layers=(0,)))


def test_a_layer_that_lacks_its_parts_is_refused(make_model, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(LLAMA_STYLE, attention="attn"))
    with pytest.raises(UnsupportedArchitecture, match=r"LlamaModel has no layers\[0\]\.attn"):
        truncate(make_model("llama"), Wanted(resid_layers=(0,)))
