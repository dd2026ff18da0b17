"""Load a causal language model and cut it down to what a harvest asks for.

The layers above, the final norm and the vocabulary projection are neither computed nor kept in memory. If only the
attention of the last layer is wanted, only its input norm and its query and key projections are kept. All model code is
transformers' own; `architectures` locates its parts, `hooks` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ...cache_schema.numbers_in_words import first_line
from ...cache_schema.sites import RESID, Site
from ..errors import (
    UNREADABLE,
    ContextTooLong,
    DeviceFull,
    LayerOutOfRange,
    ModelUnavailable,
    SettingInvalid,
    UnsupportedArchitecture,
    WeightsIncomplete,
)
from .architectures import architecture_of, cut, require_parts
from .attention import ATTENTION, register_attention
from .fused_on_gpu import fuse
from .products_in_16_bits import widen_products

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
GEMMA2_LAYER = 19  # of 26: the layer used in the studies
WEIGHTS_INDEX = "model.safetensors.index.json"
TEXT_PARTS = {"gemma3": "gemma3_text"}  # models that also read images, and the decoder that is their text part
TEXT_KEYS = (r"^language_model\.model\.", r"^model\.language_model\.", r"^language_model\.")  # its weights in files


@dataclass(frozen=True)
class ModelFacts:
    """The facts in a model's configuration."""

    model_type: str
    num_layers: int
    d_model: int
    num_heads: int
    max_context: int
    vocab_size: int
    num_key_heads: int | None = None  # None: the same as heads
    head_width: int | None = None  # None: the width divided by the heads

    @staticmethod
    def of(config: PretrainedConfig) -> ModelFacts:
        return ModelFacts(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            num_heads=config.num_attention_heads,
            max_context=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            num_key_heads=getattr(config, "num_key_value_heads", None),
            head_width=getattr(config, "head_dim", None),
        )

    @property
    def usual_layer(self) -> int:
        """The default layer to harvest."""
        return GEMMA2_LAYER if (self.model_type, self.num_layers) == ("gemma2", 26) else self.num_layers // 2

    def width_of(self, hook: str) -> int:
        """The width of a hook's activations."""
        heads = {"q": self.num_heads, "k": self.num_key_heads or self.num_heads, "z": self.num_heads}
        return heads[hook] * (self.head_width or self.d_model // self.num_heads) if hook in heads else self.d_model

    def validate_context(self, context: int) -> None:
        if context > self.max_context:
            raise ContextTooLong(
                f"context {context}: the model was made for at most {self.max_context} tokens. Lower --context"
            )


@dataclass(frozen=True)
class Wanted:
    """The layers whose residual stream (after the layer), attention and hooks are to be captured."""

    resid_layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()
    hooks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site whose activations are captured, residuals first."""
        hooks = {RESID: self.resid_layers, **self.hooks}
        return tuple(Site(hook, layer) for hook, layers in hooks.items() for layer in layers)

    @property
    def whole_layers(self) -> int:
        """The number of layers computed in full."""
        return max((*(site.layer + 1 for site in self.sites), *self.attention_layers), default=0)

    @property
    def num_layers(self) -> int:
        """The number of layers loaded, including a last one of which only attention is computed."""
        return max((self.whole_layers, *(layer + 1 for layer in self.attention_layers)))

    def validate(self, facts: ModelFacts) -> None:
        """Require that all layers exist, and that there is at least one."""
        options = {"residual": "--layer, --resid-layers", "attention": "--layer, --attention-layers"}
        kinds = {"residual": self.resid_layers, "attention": self.attention_layers, **self.hooks}
        for kind, layers in kinds.items():
            if kind in self.hooks:
                architecture_of(facts.model_type).tap(kind)
            absent = [layer for layer in layers if not 0 <= layer < facts.num_layers]
            if absent:
                raise LayerOutOfRange(
                    f"{kind} of layer {absent[0]}: the model has layers 0 to {facts.num_layers - 1}. "
                    f"Ask for layers in that range ({options.get(kind, '--layer, --hooks')})"
                )
        if self.num_layers == 0:
            raise LayerOutOfRange("no residual, hook or attention layer is asked for. Name at least one layer")


@dataclass(frozen=True)
class TruncatedModel:
    """A decoder stack that computes only what is wanted."""

    stack: Any
    """transformers' base model, truncated."""
    facts: ModelFacts
    wanted: Wanted


def read_facts(folder: Path) -> ModelFacts:
    """The facts of the model in a folder, without its weights."""
    return ModelFacts.of(read_config(folder))


def load_model(
    folder: Path, wanted: Wanted, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> TruncatedModel:
    """Load the part of a model that `wanted` needs from a folder."""
    config = read_config(folder)
    facts = ModelFacts.of(config)
    wanted.validate(facts)
    stack = _load_stack(folder, _shortened(config, wanted.num_layers), dtype)
    with name_full_device(
        device, "the model", "Choose another --device, or lower layers: those above them are not loaded"
    ):
        return _truncated(stack.to(device), facts, wanted)


@contextmanager
def name_full_device(device: str | torch.device, what: str, remedy: str) -> Iterator[None]:
    """Turn out-of-memory into an error with the allocator's first sentences, on requested and free memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        details = ". ".join(str(error).split(". ")[:3])
        raise DeviceFull(f"{device} has no memory left for {what} ({details}). {remedy}") from None


def make_random(
    folder: Path, num_layers: int, vocabulary: int, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """Layers of a model's shape, with random weights and a small vocabulary, to time them."""
    from transformers import AutoModel

    config: Any = _shortened(read_config(folder), num_layers)
    config.vocab_size, config.pad_token_id = vocabulary, None
    with torch.device(device):
        return AutoModel.from_config(config, dtype=dtype)


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load for a model, or none if one is missing."""
    files = [folder / WEIGHTS_FILE]
    if not files[0].is_file() and (folder / WEIGHTS_INDEX).is_file():
        shards = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ModelUnavailable(
                f"{folder / WEIGHTS_INDEX} is damaged (no weight_map of files). Download the model again"
            )
        files = [folder / shard for shard in sorted(set(shards.values()))]
    return files if all(file.is_file() for file in files) else []


def truncate(model: PreTrainedModel, wanted: Wanted) -> TruncatedModel:
    """Truncate a model in memory, in place."""
    facts = ModelFacts.of(model.config)
    wanted.validate(facts)
    require_parts(model.base_model, architecture_of(facts.model_type))  # before anything is changed
    register_attention()
    stack: Any = model.base_model
    stack.set_attn_implementation(ATTENTION)
    _shortened(stack.config, wanted.num_layers)
    return _truncated(stack, facts, wanted)


def _truncated(stack: Any, facts: ModelFacts, wanted: Wanted) -> TruncatedModel:
    attention_only = wanted.whole_layers if wanted.num_layers > wanted.whole_layers else None
    cut(stack, wanted.num_layers, attention_only, architecture_of(facts.model_type))
    widen_products(stack)
    fuse(stack, architecture_of(facts.model_type).norm)
    return TruncatedModel(stack.eval().requires_grad_(False), facts, wanted)


def _shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = num_layers
    return config


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of the text part. The type is checked first: for unknown ones transformers asks to run code."""
    raw = _read_json(folder / CONFIG_FILE)
    kind: Any = raw.get("model_type")
    architecture_of(TEXT_PARTS.get(kind, kind))
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UnsupportedArchitecture(
            f"{folder / CONFIG_FILE}: its weights are quantised (quantization_config: {method or 'of no name'}), which "
            "needs third-party code to run. Name the model they were quantised from, or a GGUF file, which is converted"
        )
    if raw.get("reorder_and_upcast_attn"):
        raise UnsupportedArchitecture(
            f"{folder / CONFIG_FILE}: reorder_and_upcast_attn, which makes GPT-2 compute attention in another order "
            "and type, is not supported: the harvest would differ from the model's computation"
        )
    from transformers import AutoConfig  # imported late: it takes seconds

    try:
        config = AutoConfig.from_pretrained(folder)
        return config.get_text_config() if kind in TEXT_PARTS else config
    except UNREADABLE as error:
        raise ModelUnavailable(f"{folder / CONFIG_FILE} cannot be read ({error}). Download the model again") from error


def names_in_files(config: PretrainedConfig, prefix: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that map a whole model's weight names to those of its text part."""
    may_be_part = config.model_type in TEXT_PARTS.values()
    return {"key_mapping": dict.fromkeys(TEXT_KEYS, prefix)} if may_be_part else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if isinstance(found := json.loads(file.read_bytes()), dict):
            return found
        reason = f"is damaged (expected an object, found {found!r:.40}). Download the model again"
    except FileNotFoundError:
        reason = "is missing. Expected the folder of a transformers model"
    except ValueError as error:  # not JSON, or not even text
        reason = f"is damaged ({error}). Download the model again"
    raise ModelUnavailable(f"{file} {reason}")


def _load_stack(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    if not find_weights(folder):
        raise WeightsIncomplete(f"{folder}: expected {WEIGHTS_FILE}, or {WEIGHTS_INDEX} with all files it lists")
    register_attention()
    config.transformers_weights = None  # or a configuration could name another file than `find_weights`
    try:
        with without_report():
            stack, report = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=ATTENTION,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # lists them in the report instead of raising
                output_loading_info=True,
                **names_in_files(config, ""),
            )
    except SafetensorError as error:
        raise WeightsIncomplete(f"{folder}: a weights file is damaged ({error}). Download the model again") from error
    except (ImportError, *UNREADABLE) as error:
        raise ModelUnavailable(
            f"{folder}: transformers cannot load it ({error}). If a package is missing, install it; if memory, "
            "free some; otherwise check the disk, or download the model again"
        ) from error
    validate_report(report, folder)
    return stack


@contextmanager
def without_report() -> Iterator[None]:
    """Silence transformers' report on weights, because layers are left out on purpose; `validate_report` checks it.

    The progress bar too: harvests and evaluations show their own, and off a terminal it prints control characters.
    """
    from transformers.utils import logging

    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()


def validate_report(report: dict[str, Any], folder: Path) -> None:
    """Refuse missing weights, which transformers fills with random numbers."""
    absent = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise WeightsIncomplete(
            f"{folder}: {len(absent)} weights are missing or have another shape, the first is {absent[0]}. "
            "Download the model again"
        )


def find_device(name: str) -> torch.device:
    """The named device; `auto` is a CUDA device if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda"):  # norms are summed in float64, which Apple's GPUs lack
        raise SettingInvalid(f"--device {name}: expected auto, cpu, cuda or cuda:1 and the like")
    found = torch.cuda.device_count()
    if kind == "cuda" and (int(index) if index.isdecimal() else 0) >= found:
        raise SettingInvalid(
            f"--device {name}: torch {torch.__version__} finds {found or 'no'} CUDA device{'s' * (found > 1)} here. "
            "Choose another --device, or auto"
        )
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        message = f"--device {name}: {first_line(error)}. Expected auto, cpu, cuda or cuda:1 and the like"
        raise SettingInvalid(message) from None
