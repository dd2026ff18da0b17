"""examples: what latents fire on, in the words of the store, to be read by a person.

Latents are spread evenly over how often they fire, from the rarest that fired `least_firings` times to the
commonest. A pattern shows the strongest latents of the first tokens of one window.
T context, F latents, K contexts of a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.strict import to_json
from ..context.ordinary import ordinary_rows
from ..context.split_windows import read_windows
from ..context.token_text import Wording
from ..model.windows import Windows
from .contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .measures.top import Strongest


@dataclass(frozen=True)
class Config:
    windows: int = 128
    """Of the test split."""
    batch_windows: int = 16
    latents: int = 24
    """Latents whose contexts are listed."""
    contexts: int = 6
    least_firings: int = 5
    tokens_before: int = 16
    tokens_after: int = 8
    pattern_tokens: int = 48
    pattern_latents: int = 24


@dataclass(eq=False)
class Seen:
    """What a pass over windows leaves of one SAE."""

    strongest: Strongest
    fired: Tensor  # int64 [F]
    rows: int = 0  # that are not massive
    pattern: dict[str, Any] | None = None


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    words, tokens = Wording(context), 0
    seen = {
        subject: Seen(
            Strongest.none(config.contexts, subject.width, context.device),
            torch.zeros(subject.width, dtype=torch.int64, device=context.device),
        )
        for subject in subjects
    }
    for batch in read_windows(context, subjects, "examples", config.windows, config.batch_windows):
        words.read(batch)
        for subject, one in seen.items():
            rows = ordinary_rows(context, subject, batch)
            acts = subject.encode(batch) * rows[:, :, None]
            take(one, acts[batch.keep], tokens)
            one.rows += int(rows.sum())
            if one.pattern is None:
                one.pattern = pattern_of(batch, acts, words, config)
        tokens += int(batch.keep.sum())
    for subject, one in seen.items():
        firing = {"tokens": one.rows, "massive_tokens": tokens - one.rows}
        firing |= {"alive_share": float((one.fired > 0).double().mean())}
        listed = {"latents": contexts(one, words, config), "pattern": one.pattern}
        yield Result(subject, to_json(config), {"firing": firing}, unstructured=listed)


def take(seen: Seen, acts_NF: Tensor, first: int) -> None:
    places = torch.arange(first, first + len(acts_NF), device=acts_NF.device)
    seen.strongest = seen.strongest.with_batch(acts_NF, places)
    seen.fired += (acts_NF > 0).sum(0)


def contexts(seen: Seen, words: Wording, config: Config) -> list[dict[str, Any]]:
    """The strongest contexts of some latents, the rarest first."""
    listed = []
    for latent in spread_by_frequency(seen.fired, config.latents, config.least_firings):
        found = [
            {"activation": value, **dict(zip(("before", "token", "after"), text, strict=True))}
            for value, text in (
                (value, words.context(place, config.tokens_before, config.tokens_after))
                for value, place in seen.strongest.of(latent)
            )
        ]
        listed.append({"latent": latent, "fired_share": int(seen.fired[latent]) / max(seen.rows, 1), "contexts": found})
    return listed


def spread_by_frequency(fired: Tensor, count: int, least: int) -> list[int]:
    """Latents that fired at least so often, evenly spaced in their order of frequency."""
    order = fired.argsort(stable=True)
    order = order[fired[order] >= least]
    if len(order) <= count:
        return order.tolist()
    return order[torch.linspace(0, len(order) - 1, count, device=order.device).long()].tolist()


def pattern_of(batch: Windows, acts_WTF: Tensor, words: Wording, config: Config) -> dict[str, Any]:
    """The first tokens of the batch's first window against its strongest latents, in order of first firing."""
    kept = batch.keep[0].nonzero().view(-1)[: config.pattern_tokens]
    acts_TF = acts_WTF[0, kept]
    latents = acts_TF.amax(0).topk(min(config.pattern_latents, acts_TF.shape[1])).indices
    latents = latents[acts_TF[:, latents].amax(0) > 0]
    latents = latents[(acts_TF[:, latents] > 0).int().argmax(0).argsort(stable=True)]
    return {
        "tokens": [words.write([token]) for token in batch.tokens[0, kept].tolist()],
        "positions": kept.tolist(),
        "latents": latents.tolist(),
        "activations": [[round(value, 4) for value in row] for row in acts_TF[:, latents].T.tolist()],
    }


EVALUATION = Evaluation(Config, evaluate, needs=Needs(store=True), summary=("firing.alive_share",))
