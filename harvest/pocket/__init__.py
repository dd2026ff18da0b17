"""The bundled pocket model: a 26-layer Gemma-2 small enough to ship with the package.

`MODEL_FOLDER` is an ordinary Hugging Face folder, made by the scripts in `bench/pocket/`. MODEL_CARD.md has the
model's uses and limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).parent / "model"


def load_model(dtype: torch.dtype | None = None, folder: Path = MODEL_FOLDER) -> Gemma2ForCausalLM:
    """The model, in its stored bfloat16 or in another dtype, with eager attention."""
    from transformers import Gemma2ForCausalLM  # imported late: it takes seconds

    model = Gemma2ForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def load_tokenizer(folder: Path = MODEL_FOLDER) -> PreTrainedTokenizerFast:
    """Its tokenizer, which puts BOS first and can encode every byte."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
