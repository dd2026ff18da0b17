"""The head of a language model alone: final norm and unembedding, without the layers below them.

It says which tokens a direction of the residual stream promotes. Of a model of gigabytes two tables are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...harvest.errors import HarvestError
from ...harvest.model.architectures import architecture_of
from ...harvest.model.load import find_weights, read_facts
from ..errors import ModelMissing


@dataclass(frozen=True, eq=False)
class Head:
    """From directions to what they add to the logits, up to a factor."""

    norm: Callable[[Tensor], Tensor]
    unembedding: Tensor  # [V, D]

    @torch.inference_mode()
    def promotes(self, directions_ND: Tensor) -> Tensor:
        """Logits [N, V] of directions alone, scaled as the norm scales them; what the norm itself adds is taken off."""
        x = directions_ND.to(self.unembedding.dtype)
        return (self.norm(x) - self.norm(torch.zeros_like(x))) @ self.unembedding.T


def head_of(model: Any) -> Head:
    """The head of a model in memory."""
    norm: nn.Module = getattr(model.base_model, architecture_of(model.config.model_type).final_norm)
    return Head(norm, model.get_output_embeddings().weight)


def load_head(folder: Path, device: torch.device) -> Head:
    """The head of a model on disk, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here: it takes seconds to import

    try:
        read_facts(folder)  # refuses types that only downloaded code could run
        config = AutoConfig.from_pretrained(folder)
        config.num_hidden_layers = 0
        with torch.device("meta"):
            bare: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        norm = getattr(bare.base_model, architecture_of(config.model_type).final_norm)
        embedding = bare.get_input_embeddings() if config.tie_word_embeddings else bare.get_output_embeddings()
        names = {module: name for name, module in bare.named_modules()}
        wanted = {f"{names[module]}.{part}" for module in (norm, embedding) for part, _ in module.named_parameters()}
        tables = {name: table.float().to(device) for name, table in read_tables(folder, wanted).items()}
        parts = {part: tables[f"{names[norm]}.{part}"] for part, _ in norm.named_parameters()}
        norm.load_state_dict(parts, assign=True)
        return Head(norm.requires_grad_(False), tables[f"{names[embedding]}.weight"])
    except (HarvestError, SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        raise ModelMissing(f"{folder}: no final norm and unembedding ({error}); fetch the model again") from error


def read_tables(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Those of the tensors that the folder has."""
    found = {}
    for file in find_weights(folder):
        with safe_open(file, "pt") as tables:
            found |= {name: tables.get_tensor(name) for name in names & set(tables.keys())}
    return found
