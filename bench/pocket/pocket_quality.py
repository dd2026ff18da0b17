"""How good the pocket model is: cross-entropy on text it has not seen.

Shapes: N windows, T tokens in a window.

1. Documents are packed as the harvest packs them: BOS before each document and at the start of each window.
2. Cross-entropy is the mean over all targets that are not BOS.
3. The yardstick is the unigram entropy of the same targets: the loss of the best guess without context.

`python bench/pocket/pocket_quality.py` measures the bundled model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from held_out_text import held_out_documents
from make_tokenizer import BOS

from saemill.harvest.pocket import MODEL_FOLDER, load_model, load_tokenizer

CONTEXTS = (128, 512, 1024)


@dataclass(frozen=True)
class Quality:
    """Nats per token, over `tokens` predicted tokens in windows of `context`."""

    context: int
    tokens: int
    cross_entropy: float
    unigram_entropy: float

    @property
    def gain(self) -> float:
        """How much context helps the model, in nats per token."""
        return self.unigram_entropy - self.cross_entropy


def join_documents(documents: Iterable[list[int]], bos: int) -> np.ndarray:
    """One run of tokens, BOS before each document."""
    return np.concatenate([np.array([bos, *ids], dtype=np.int64) for ids in documents])


def measure(model: torch.nn.Module, run: np.ndarray, bos: int, context: int, batch: int = 8) -> Quality:
    """Quality over the full windows in the run."""
    inputs_NT, targets_NT = _windows(run, bos, context)
    losses = [
        _losses(model, inputs_NT[i : i + batch], targets_NT[i : i + batch]) for i in range(0, len(inputs_NT), batch)
    ]
    is_counted = targets_NT != bos
    mean = float(np.concatenate(losses)[is_counted].mean(dtype=np.float64))
    return Quality(context, int(is_counted.sum()), mean, unigram_entropy(targets_NT[is_counted]))


def unigram_entropy(tokens: np.ndarray) -> float:
    counts = np.bincount(tokens.ravel())
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def measure_folder(folder: Path, documents: Iterable[tuple[str, str]]) -> list[Quality]:
    """Quality of a saved model at each of the usual contexts."""
    model, tokenizer = load_model(folder=folder), load_tokenizer(folder)
    texts = [text for _, text in documents]
    run = join_documents(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids, BOS)
    return [measure(model, run, BOS, context) for context in CONTEXTS]


@click.command(help="Measure the pocket model on the text that was held out of its training.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=MODEL_FOLDER, show_default=True)
def main(folder: Path) -> None:
    click.echo("context   tokens   cross-entropy   unigram entropy   gain")
    for quality in measure_folder(folder, held_out_documents()):
        click.echo(
            f"{quality.context:7d}  {quality.tokens:7d}   {quality.cross_entropy:13.4f}"
            f"   {quality.unigram_entropy:15.4f}   {quality.gain:.4f}"
        )


def _windows(run: np.ndarray, bos: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    targets_NT = run[: len(run) // context * context].reshape(-1, context)
    start_N1 = np.full((len(targets_NT), 1), bos)
    return np.concatenate([start_N1, targets_NT[:, :-1]], axis=1), targets_NT


@torch.no_grad()
def _losses(model: torch.nn.Module, inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    logits_BTV = model(input_ids=torch.from_numpy(inputs_BT), use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), torch.from_numpy(targets_BT).flatten(), reduction="none"
    )
    return losses.view(targets_BT.shape).numpy()


if __name__ == "__main__":
    main()
