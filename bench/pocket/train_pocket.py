"""Train the pocket model on the standard library of the running Python.

\b
    python bench/pocket/train_pocket.py --out DIR --minutes 75

1. Read the text, hold out whole documents, train the tokenizer on the rest.

2. Train for the planned minutes: the learning rate follows the clock, so the run
ends on time however busy the machine is. Time in which the process is paused does not count.

3. Every few minutes, at the end and on Ctrl-C, measure on held-out text and write
a checkpoint; the same command continues from there.
"""

import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click
from pocket_model import load_checkpoint, save_checkpoint
from rich.console import Console
from trainer import EVALUATION_CONTEXT, TOKENS_PER_STEP, Trainer, context_of, learning_rate, read_corpus

LONGEST_STEP = 15.0  # seconds; the rest of a longer step was a pause
STEPS_PER_LINE = 10


@dataclass(frozen=True)
class Progress:
    """The state of a run; with the tensors, all that a resumed run needs."""

    corpus: str  # digest of the text
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def after_step(self, took: float) -> "Progress":
        return replace(self, step=self.step + 1, tokens=self.tokens + TOKENS_PER_STEP, seconds=self.seconds + took)


@dataclass(frozen=True)
class Plan:
    """What the command line asks for: how long to train, and where to save."""

    out: Path
    minutes: float
    save_every: float


class Interrupt:
    """Ctrl-C as a flag that the loop checks, so that no step is left half done."""

    def __init__(self) -> None:
        self.is_asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self.is_asked = True


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoints.")
@click.option("--minutes", default=75.0, show_default=True, help="Training time in all.")
@click.option("--save-every", default=3.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--seed", default=0, show_default=True)
@click.option("--compile/--no-compile", "is_compiled", default=True, help="Compile the layers (needs a C++ compiler).")
def main(out: Path, minutes: float, save_every: float, seed: int, is_compiled: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(out / "tokenizer.json")
    interrupt = Interrupt()
    trainer = Trainer(corpus, seed, is_compiled)
    train(trainer, _resume(trainer, Progress(corpus.digest), out), Plan(out, minutes, save_every), interrupt)


def train(trainer: Trainer, progress: Progress, plan: Plan, interrupt: Interrupt) -> None:
    """Train from `progress` until the planned time is used up."""
    console = Console()
    budget = 60 * plan.minutes
    saved = progress
    losses: list[float] = []
    while (done := 1.0 if interrupt.is_asked else progress.seconds / budget) < 1:
        began = time.monotonic()
        loss = trainer.advance(progress.step, learning_rate(progress.step, done))
        took = min(time.monotonic() - began, LONGEST_STEP)
        if context_of(progress.step) == EVALUATION_CONTEXT:
            losses.append(loss)
        progress = progress.after_step(took)
        if progress.step % STEPS_PER_LINE == 0:
            _say(console, progress, loss, took, budget)
        if progress.seconds > saved.seconds + 60 * plan.save_every:
            saved = progress = _save(trainer, progress, losses, plan.out, console)
            losses = []
    if progress.step > saved.step:
        _save(trainer, progress, losses, plan.out, console)


def _resume(trainer: Trainer, fresh: Progress, out: Path) -> Progress:
    found = load_checkpoint(out)
    if found is None:
        return fresh
    tensors, record = found
    progress = Progress(**record)
    if progress.corpus != fresh.corpus:
        raise click.ClickException(
            f"{out} was trained on text {progress.corpus[:12]}, this Python has {fresh.corpus[:12]}; "
            "resume with the Python version that started it, or choose another --out"
        )
    trainer.optimizer.load_state(tensors)
    return progress


def _save(trainer: Trainer, progress: Progress, losses: list[float], out: Path, console: Console) -> Progress:
    point = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "held_out_loss": round(trainer.evaluate(), 4),
    }
    if losses:
        point["train_loss"] = round(sum(losses) / len(losses), 4)
    progress = replace(progress, curve=[*progress.curve, point])
    save_checkpoint(out, trainer.optimizer.state(), asdict(progress))
    console.print(f"saved {point}", highlight=False, soft_wrap=True)
    return progress


def _say(console: Console, progress: Progress, loss: float, took: float, budget: float) -> None:
    console.print(
        f"step {progress.step}  tokens {progress.tokens / 1e6:.2f}M  loss {loss:.3f}  "
        f"{TOKENS_PER_STEP / took:,.0f} tok/s  {(budget - progress.seconds) / 60:.1f} min left",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
