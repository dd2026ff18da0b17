"""The bundled pocket model: a 26-layer Gemma-2 small enough to ship with the package.

`MODEL_FOLDER` is an ordinary Hugging Face folder; MODEL_CARD.md says what the model
is good for. The folder is made by the scripts in `bench/pocket/`.
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
    from transformers import Gemma2ForCausalLM  # here, as it takes seconds to import

    model = Gemma2ForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def load_tokenizer(folder: Path = MODEL_FOLDER) -> PreTrainedTokenizerFast:
    """Its tokenizer, which puts BOS first and knows every byte."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
