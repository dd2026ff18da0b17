"""One process's share of the pocket model's training: its text, its model, one step.

Shapes: B windows, T tokens in a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from .architecture import make_model
from .batches import Batches
from .held_out import is_held_out
from .make_tokenizer import BOS, train_tokenizer
from .optimizer import Optimizer, make_optimizer
from .quality import join_documents, measure
from .team import Team
from .text import stdlib_documents, text_digest

TOKENS_PER_STEP = 4096
WARMUP_STEPS = 40
DECAY_FROM = 0.4  # of the planned time; from here the rate falls in a line
EVALUATION_CONTEXT = 128
CURVE_STRETCHES = 6


@dataclass(frozen=True)
class Corpus:
    """The standard library in tokens, with BOS before each document."""

    digest: str
    train: np.ndarray
    held_out: np.ndarray


def read_corpus(tokenizer_file: Path) -> Corpus:
    """The text in tokens; learns the tokenizer once, and keeps it in the file."""
    documents = list(stdlib_documents())
    texts = [text for _, text in documents if not is_held_out(text)]
    held_out = [text for _, text in documents if is_held_out(text)]
    if not tokenizer_file.exists():
        train_tokenizer(texts).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    train, rest = (join_documents(_encode(tokenizer, part), BOS) for part in (texts, held_out))
    return Corpus(text_digest(documents), train, rest)


def learning_rate(step: int, done: float) -> float:
    """The share of the full rate at a step, `done` of the planned time being used."""
    falling = (1 - done) / (1 - DECAY_FROM)
    return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, falling))


class Trainer:
    """A model, its optimizer and its batches."""

    def __init__(self, team: Team, corpus: Corpus, seed: int, is_compiled: bool) -> None:
        self.team = team
        self.model: Any = make_model(seed)
        self.optimizer: Optimizer = make_optimizer(self.model, team)
        self.batches = Batches(corpus.train, BOS, TOKENS_PER_STEP, seed)
        self.held_out = _sample(corpus.held_out)
        self.loss: Any = _loss
        if is_compiled:
            self._compile()

    def advance(self, step: int, rate: float) -> float:
        """One step at `rate` times the full learning rates; returns this process's loss."""
        inputs_BT, targets_BT = (self._share(part) for part in self.batches.batch(step))
        hidden = self.model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        softcap = self.model.config.final_logit_softcapping
        loss = self.loss(hidden, self.model.lm_head.weight, targets_BT, softcap)
        loss.backward()
        self.optimizer.step(rate)
        return loss.item()

    def evaluate(self) -> float:
        """Cross-entropy on a sample of the held-out text."""
        batch = TOKENS_PER_STEP // EVALUATION_CONTEXT // self.team.size
        return measure(self.model, self.held_out, BOS, EVALUATION_CONTEXT, batch).cross_entropy

    def _share(self, windows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(windows[self.team.rank :: self.team.size].copy())

    def _compile(self) -> None:
        """Layer by layer: 26 equal layers compile once, a whole model would take minutes."""
        torch._dynamo.config.recompile_limit = 64  # layer kinds times contexts, and evaluation
        self.loss = torch.compile(_loss, dynamic=False)
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    return (encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))


def _loss(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, table).float()
    logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _sample(held_out: np.ndarray) -> np.ndarray:
    """A few stretches of the held-out text, enough for a curve."""
    stretches = held_out[: len(held_out) // TOKENS_PER_STEP * TOKENS_PER_STEP].reshape(-1, TOKENS_PER_STEP)
    return stretches[:: max(1, len(stretches) // CURVE_STRETCHES)][:CURVE_STRETCHES].ravel()
