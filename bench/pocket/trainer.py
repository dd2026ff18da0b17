"""The pocket model's training: its text, optimizer, model and single step.

Shapes: B windows, T tokens in a window.

The optimizer, Muon for matrices and AdamW for the rest, in bfloat16 arithmetic:
1. The model computes in bfloat16; a float32 master copy of each weight takes the updates.
2. Gradients are clipped by their common norm.
3. Matrices inside the layers go to Muon, embedding and gains to AdamW.
4. The masters are rounded back into the model.

The tokens of a step are a pure function of the step:
1. Each document starts with BOS; documents are joined into one long run of tokens.
2. A pass over the run, for one context T, cuts it at a random phase into pieces of T tokens and visits each once, in
   random order.
3. A window is BOS and the piece without its last token; the piece is the target.
4. Most steps have a short context; a few in each cycle have a long one, so that far positions are learned too. Passes
   are counted per context.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out_text import is_held_out
from make_tokenizer import BOS, train_tokenizer
from pocket_model import make_model
from pocket_quality import join_documents, measure
from tokenizers import Tokenizer
from torch import Tensor

from saemill.harvest.corpus.stdlib import stdlib_documents, text_digest

CYCLE = (128,) * 7 + (512,) + (128,) * 7 + (1024,)  # the context of each step, repeated
MATRIX_RATE = 6e-3
EMBEDDING_RATE = 3e-3
GAIN_RATE = 3e-3
CLIP_NORM = 1.0
TOKENS_PER_STEP = 4096
WARMUP_STEPS = 40
DECAY_FROM = 0.4  # of the planned time; from here on the rate falls linearly
EVALUATION_CONTEXT = 128
CURVE_STRETCHES = 6


@dataclass(frozen=True)
class Corpus:
    """The standard library in tokens, with BOS before each document."""

    digest: str
    train: np.ndarray
    held_out: np.ndarray


def read_corpus(tokenizer_file: Path) -> Corpus:
    """The text in tokens; trains the tokenizer once and keeps it in the file."""
    documents = list(stdlib_documents())
    texts = [text for _, text in documents if not is_held_out(text)]
    held_out = [text for _, text in documents if is_held_out(text)]
    if not tokenizer_file.exists():
        train_tokenizer(texts).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    train, rest = (join_documents(_encode(tokenizer, part), BOS) for part in (texts, held_out))
    return Corpus(text_digest(documents), train, rest)


def learning_rate(step: int, done: float) -> float:
    """The share of the full rate at a step, when the share `done` of the planned time is used."""
    falling = (1 - done) / (1 - DECAY_FROM)
    return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, falling))


class Trainer:
    """A model, its optimizer and its batches."""

    def __init__(self, corpus: Corpus, seed: int, is_compiled: bool) -> None:
        self.model: Any = make_model(seed)
        self.optimizer: Optimizer = make_optimizer(self.model)
        self.batches = Batches(corpus.train, BOS, TOKENS_PER_STEP, seed)
        self.held_out = _sample(corpus.held_out)
        self.loss: Any = _loss
        if is_compiled:
            self._compile()

    def advance(self, step: int, rate: float) -> float:
        """One step at `rate` times the full learning rates; returns the loss."""
        inputs_BT, targets_BT = map(torch.from_numpy, self.batches.batch(step))
        hidden = self.model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        softcap = self.model.config.final_logit_softcapping
        loss = self.loss(hidden, self.model.lm_head.weight, targets_BT, softcap)
        loss.backward()
        self.optimizer.step(rate)
        return loss.item()

    def evaluate(self) -> float:
        """Cross-entropy on a sample of the held-out text."""
        batch = TOKENS_PER_STEP // EVALUATION_CONTEXT
        return measure(self.model, self.held_out, BOS, EVALUATION_CONTEXT, batch).cross_entropy

    def _compile(self) -> None:
        """Compile layer by layer: 26 equal layers compile once, a whole model would take minutes."""
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


@dataclass(frozen=True)
class Batches:
    """All training batches: `batch(step)` needs no state, so a run resumes anywhere."""

    run: np.ndarray  # int64, all training tokens, BOS before each document
    bos: int
    tokens_per_step: int
    seed: int

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_BT, targets_BT) of one step."""
        context = context_of(step)
        size = self.tokens_per_step // context
        per_pass = (len(self.run) // context - 1) // size
        number, place = divmod(_earlier(step, context), per_pass)
        starts = self._starts(context, number)[place * size : (place + 1) * size]
        targets_BT = self.run[starts[:, None] + np.arange(context)]
        inputs_BT = np.concatenate([np.full((size, 1), self.bos), targets_BT[:, :-1]], axis=1)
        return inputs_BT, targets_BT

    def _starts(self, context: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, context, number])
        pieces = len(self.run) // context - 1
        return rng.integers(context) + context * rng.permutation(pieces)


def context_of(step: int) -> int:
    return CYCLE[step % len(CYCLE)]


def _earlier(step: int, context: int) -> int:
    """How many steps before this one had the same context."""
    cycles, rest = divmod(step, len(CYCLE))
    return cycles * CYCLE.count(context) + CYCLE[:rest].count(context)


@dataclass(frozen=True)
class Optimizer:
    """Master weights by name, and the two optimizers that move them."""

    model: torch.nn.Module
    masters: dict[str, Tensor]
    muon: torch.optim.Optimizer
    adam: torch.optim.Optimizer

    def step(self, rate: float) -> float:
        """One update at `rate` times the full learning rates; returns the gradient's norm."""
        self._collect_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), CLIP_NORM, error_if_nonfinite=True)
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["full_rate"]
            optimizer.step()
        self.write_back()
        return norm.item()

    def _collect_gradients(self) -> None:
        """Move the model's gradients to the masters."""
        for name, weight in self.model.named_parameters():
            assert weight.grad is not None, name
            self.masters[name].grad = weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        for name, weight in self.model.named_parameters():
            weight.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, by flat names."""
        flat = {f"master/{name}": tensor.detach() for name, tensor in self.masters.items()}
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for index, slots in optimizer.state_dict()["state"].items():
                flat |= {f"{kind}/{index}/{slot}": tensor for slot, tensor in slots.items()}
        return flat

    @torch.no_grad()
    def load_state(self, flat: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(flat[f"master/{name}"])
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = {}
            for key in (key for key in flat if key.startswith(f"{kind}/")):
                _, index, slot = key.split("/")
                state.setdefault(int(index), {})[slot] = flat[key]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.write_back()


def make_optimizer(model: torch.nn.Module) -> Optimizer:
    """Copy a float32 model's weights as masters, and convert the model to bfloat16."""
    masters = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    model.to(torch.bfloat16)
    matrices = [w for name, w in masters.items() if w.ndim == 2 and ".layers." in name]
    tables = [w for name, w in masters.items() if w.ndim == 2 and ".layers." not in name]
    gains = [w for w in masters.values() if w.ndim == 1]
    muon = torch.optim.Muon(
        [{"params": matrices, "full_rate": MATRIX_RATE}], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [
            {"params": tables, "full_rate": EMBEDDING_RATE, "weight_decay": 0.01},
            {"params": gains, "full_rate": GAIN_RATE, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    return Optimizer(model, masters, muon, adam)
