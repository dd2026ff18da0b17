"""Train the pocket model on this machine's standard library.

    python -m saemill.harvest.pocket.train --out DIR --minutes 80

1. Read the text, set whole documents aside, learn the tokenizer from the rest.
2. Train for the planned minutes: the learning rate follows the clock, so the run
   ends on time however busy the machine is. A paused process does not use time up.
3. Every few minutes, and at the end or on Ctrl-C, measure on held-out text and
   write a checkpoint; the same command goes on from there.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer

from .architecture import make_model
from .batches import Batches, context_of
from .checkpoint import load_checkpoint, save_checkpoint
from .make_tokenizer import BOS, train_tokenizer
from .optimizer import Optimizer, make_optimizer
from .quality import is_held_out, join_documents, measure
from .team import Team, working_team
from .text import stdlib_documents, text_digest

TOKENS_PER_STEP = 4096
WARMUP_STEPS = 40
DECAY_FROM = 0.4  # of the planned time; from here the rate falls in a line
LONGEST_STEP = 15.0  # seconds; what goes beyond is a pause
EVALUATION_CONTEXT = 128
CURVE_STRETCHES = 6


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the tensors, all that a resumed run needs."""

    corpus: str  # digest of the text
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def after_step(self, took: float) -> "Progress":
        return replace(
            self, step=self.step + 1, tokens=self.tokens + TOKENS_PER_STEP, seconds=self.seconds + took
        )


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    out: Path
    minutes: float
    save_every: float
    seed: int
    compiled: bool

    @property
    def seconds(self) -> float:
        return 60 * self.minutes


@dataclass(frozen=True)
class Corpus:
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


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    return (encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))


def _loss(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, table).float()
    logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Trainer:
    """One model, its optimizer and its batches; `advance` does one step."""

    def __init__(self, team: Team, corpus: Corpus, seed: int, compiled: bool) -> None:
        self.team = team
        self.model: Any = make_model(seed)
        self.optimizer: Optimizer = make_optimizer(self.model, team)
        self.batches = Batches(corpus.train, BOS, TOKENS_PER_STEP, seed)
        self.held_out = _sample(corpus.held_out)
        self.loss = _loss
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # layer kinds times contexts, and evaluation
            self.loss = torch.compile(_loss, dynamic=False)
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)

    def advance(self, step: int, rate: float) -> float:
        inputs_BT, targets_BT = (self._share(part) for part in self.batches.batch(step))
        hidden = self.model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        softcap = self.model.config.final_logit_softcapping
        loss = self.loss(hidden, self.model.lm_head.weight, targets_BT, softcap)
        loss.backward()
        self.optimizer.step(rate)
        return loss.item()

    def _share(self, windows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(windows[self.team.rank :: self.team.size].copy())

    def evaluate(self) -> float:
        batch = TOKENS_PER_STEP // EVALUATION_CONTEXT // self.team.size
        return measure(self.model, self.held_out, BOS, EVALUATION_CONTEXT, batch).cross_entropy


def _sample(held_out: np.ndarray) -> np.ndarray:
    """A few stretches of the held-out text, enough for a curve."""
    stretches = held_out[: len(held_out) // TOKENS_PER_STEP * TOKENS_PER_STEP].reshape(-1, TOKENS_PER_STEP)
    return stretches[:: max(1, len(stretches) // CURVE_STRETCHES)][:CURVE_STRETCHES].ravel()


def train(trainer: Trainer, progress: Progress, plan: Plan) -> None:
    """Go on from `progress` until the planned time is used; process 0 saves as it goes."""
    console = Console(quiet=trainer.team.rank > 0)
    saved = progress.seconds
    losses: list[float] = []
    while (done := trainer.team.agree(progress.seconds / plan.seconds)) < 1:
        began = time.monotonic()
        loss = trainer.advance(progress.step, learning_rate(progress.step, done))
        took = min(time.monotonic() - began, LONGEST_STEP)
        if context_of(progress.step) == EVALUATION_CONTEXT:
            losses.append(loss)
        progress = progress.after_step(took)
        if progress.step % 10 == 0:
            _say(console, progress, loss, took, plan)
        is_due = progress.seconds > saved + 60 * plan.save_every or progress.seconds >= plan.seconds
        if is_due and trainer.team.rank == 0:
            progress = _save(trainer, progress, losses, plan.out, console)
            saved, losses = progress.seconds, []


def _save(trainer: Trainer, progress: Progress, losses: list[float], out: Path, console: Console) -> Progress:
    point = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "train_loss": round(float(np.mean(losses)), 4) if losses else float("nan"),
        "held_out_loss": round(trainer.evaluate(), 4),
    }
    progress = replace(progress, curve=[*progress.curve, point])
    save_checkpoint(out, trainer.optimizer.state(), asdict(progress))
    console.print(f"saved {point}", highlight=False, soft_wrap=True)
    return progress


def _say(console: Console, progress: Progress, loss: float, took: float, plan: Plan) -> None:
    left = plan.minutes - progress.seconds / 60
    console.print(
        f"step {progress.step}  tokens {progress.tokens / 1e6:.2f}M  loss {loss:.3f}  "
        f"{TOKENS_PER_STEP / took:,.0f} tok/s  {left:.1f} min left",
        highlight=False,
        soft_wrap=True,
    )


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoints.")
@click.option("--minutes", default=80.0, show_default=True, help="Training time in all.")
@click.option("--save-every", default=3.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--processes", default=2, show_default=True, help="One-thread processes that share the work.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Compile the layers (needs a C++ compiler)."
)
def main(out: Path, minutes: float, save_every: float, processes: int, seed: int, compiled: bool) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    meeting = out / "meeting"
    meeting.unlink(missing_ok=True)
    plan = Plan(out, minutes, save_every, seed, compiled)
    corpus = read_corpus(out / "tokenizer.json")
    with working_team(processes, meeting, work, plan, corpus) as team:
        work(team, plan, corpus)


def work(team: Team, plan: Plan, corpus: Corpus) -> None:
    """One process of the team, from a fresh model or a checkpoint to the last step."""
    trainer = Trainer(team, corpus, plan.seed, plan.compiled)
    progress = _resume(trainer, Progress(corpus.digest), plan.out)
    train(trainer, progress, plan)


def _resume(trainer: Trainer, fresh: Progress, out: Path) -> Progress:
    found = load_checkpoint(out)
    if found is None:
        return fresh
    tensors, record = found
    progress = Progress(**record)
    if progress.corpus != fresh.corpus:
        raise click.ClickException(
            f"{out} was trained on text {progress.corpus[:12]}, this Python has {fresh.corpus[:12]}; "
            "resume with the Python that began, or choose another --out"
        )
    trainer.optimizer.load_state(tensors)
    return progress


if __name__ == "__main__":
    main()
