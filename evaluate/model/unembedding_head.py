"""The head of a language model alone: final norm and unembedding, without the layers below them.

It shows which tokens a direction of the residual stream promotes. Only these tables of the model are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from ...harvest.errors import HarvestError
from ...harvest.model.architectures import architecture_of
from ...harvest.model.load_and_truncate import find_weights, read_config
from ...harvest.model.products_in_16_bits import matmul
from ..errors import ModelMissing
from .smaller_pieces import NO_ROOM, is_out_of_memory

# Modules that hold the unembedding, by whether it is tied to the embedding.
TABLES = {True: ("embed_tokens", "embed_in", "wte"), False: ("lm_head", "embed_out")}


@dataclass(frozen=True, eq=False)
class Head:
    """Maps directions to what they add to the logits, up to a factor."""

    norm: Callable[[Tensor], Tensor]
    unembedding: Tensor  # [V, D]

    @torch.inference_mode()
    def promotes(self, directions_ND: Tensor) -> Tensor:
        """Logits [N, V] of directions alone, as the norm scales them, without what the norm adds to any input."""
        x = directions_ND.to(self.unembedding.dtype)
        return matmul(self.norm(x) - self.norm(torch.zeros_like(x)), self.unembedding.T)


def load_head(folder: Path, device: torch.device) -> Head:
    """The head of a model on disk, in float32; the model's own classes would take seconds to import."""
    try:
        config: Any = read_config(folder)
        architecture = architecture_of(config.model_type)
        names = (architecture.final_norm, *TABLES[config.tie_word_embeddings])
        tables = {name: table.float().to(device) for name, table in read_tables(folder, names)}
        weight, bias = (tables.get(f"{architecture.final_norm}.{part}") for part in ("weight", "bias"))
        found = [tables[f"{name}.weight"] for name in names[1:] if f"{name}.weight" in tables]
        if weight is None or not found:
            raise KeyError(f"expected {', '.join(names)}, found {[*tables]}")
        return Head(norm_of(architecture.norm, config, weight, bias), found[0])
    except (HarvestError, SafetensorError, OSError, KeyError, RuntimeError, ValueError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ModelMissing(f"{folder}: its unembedding does not fit into memory ({error}). {NO_ROOM}") from error
        raise ModelMissing(f"{folder}: no final norm and unembedding ({error}); fetch the model again") from error


def read_tables(folder: Path, modules: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of modules outside the layers, by the last two parts of their names."""
    for file in find_weights(folder):
        with safe_open(file, "pt") as tables:
            for key in tables.keys():  # noqa: SIM118  # it is not a mapping
                parts = key.split(".")
                if 2 <= len(parts) <= 4 and parts[-2] in modules:  # four in a text model inside a larger one
                    yield ".".join(parts[-2:]), tables.get_tensor(key)


def norm_of(kind: str, config: Any, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The norm that `Architecture.norm` names, bit for bit as transformers computes it in float32."""
    if kind == "layer":
        eps = config.layer_norm_epsilon if hasattr(config, "layer_norm_epsilon") else config.layer_norm_eps
        return lambda x: functional.layer_norm(x, weight.shape, weight, bias, eps)
    scale = 1.0 + weight if kind == "rms from one" else weight
    return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * scale
