"""replacement: the model's losses with an SAE's output in place of what it rebuilds, against skipping that place.

For SAEs and transcoders on any hook: a transcoder from `mlp_in` to `mlp_out` replaces the MLP. The model runs from
tokens, so all activations are its own.

1. One clean pass of a batch keeps what SAEs read and what they rebuild.
2. One pass for each place with zeros in it, and one for each SAE with its output in it. An SAE that rebuilds several
   layers replaces all at once, from what it read in the clean pass. Special tokens and massive rows keep theirs.

W windows, T positions, N tokens that count, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.sites import RESID, Place, Site, place_of, site_of
from ...cache_schema.strict_json import to_json
from ...harvest.errors import HarvestError
from ...harvest.model.architectures import architecture_of
from ...train.run.validate_and_save_results import Tally
from ..context.stored_windows import TextCount, read_windows, say_if_fewer, tell_bounds, without_massive
from ..errors import DataMissing, NotApplicable, WidthMismatch
from ..model.batches import Windows
from ..model.ce_and_kl import next_tokens, rows_of_logits
from ..model.smaller_pieces import PieceSize
from .core.sparsity_and_variance import NAN, ratio
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .measures.splice_effects import Effect, effects_of


@dataclass(frozen=True)
class Config:
    windows: int = 64
    """Of the test split."""
    batch_windows: int = 16


@dataclass
class Seen:
    """Sums over the tokens that count for one SAE."""

    effects: dict[str, Effect] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    text: TextCount = field(default_factory=TextCount)

    def add(self, effects: dict[str, Effect], acts_NF: Tensor, y_ND: Tensor, y_hat_ND: Tensor) -> None:
        self.effects = {name: self.effects.get(name, Effect()) + found for name, found in effects.items()}
        self.tally.add(y_ND, y_hat_ND, (acts_NF != 0).sum(dim=1))

    def metrics(self) -> dict[str, float]:
        clean, skipped, replaced = (self.effects[name] for name in ("clean", "skipped", "replaced"))
        explained = self.tally.explained_variance
        return {
            "ce_clean": clean.loss,
            "ce_replaced": replaced.loss,
            "ce_skipped": skipped.loss,
            "ce_score": ratio(skipped.loss - replaced.loss, skipped.loss - clean.loss),
            "kl_replaced": replaced.kl,
            "kl_skipped": skipped.kl,
            "kl_score": ratio(skipped.kl - replaced.kl, skipped.kl),
            "explained_variance": NAN if explained is None else explained,
            "l0": self.tally.l0,
            "tokens": self.tally.tokens,
        }


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    if context.without_tokens:
        raise DataMissing(context.without_tokens)
    context.require_model()
    found: dict[LoadedSae, Seen] = {}
    for subject in subjects:
        try:
            _require_place(context, subject)
        except (NotApplicable, WidthMismatch) as error:
            yield Failure(subject, error)
        except HarvestError as error:  # this model does not have the hook
            yield Failure(subject, NotApplicable(str(error)))
        else:
            found[subject] = Seen()
    if not found:
        return
    say_if_fewer(context, "replacement", config)
    subjects, size, rows = list(found), config.batch_windows, rows_of_logits(context.model, context.say)
    for batch in read_windows(context, subjects, "replacement", config.windows, size, layers=()):
        _add_batch(context, found, batch, rows)
    for subject, seen in found.items():
        metrics, remark = {"replacement": seen.metrics()}, tell_bounds(context, subject, places_of(subject))
        yield Result(subject, to_json(config), metrics, remark=remark, measured_on=str(seen.text))


def sites_read(subject: LoadedSae) -> list[Site]:
    return [Site(subject.hooks[0], layer) for layer in subject.layers]


def sites_written(subject: LoadedSae) -> list[Site]:
    return [Site(subject.hooks[1], layer) for layer in subject.target_layers]


def places_of(subject: LoadedSae) -> list[Place]:
    return [place_of(*site) for site in dict.fromkeys((*sites_read(subject), *sites_written(subject)))]


def _require_place(context: Context, subject: LoadedSae) -> None:
    """Require that the model has what the SAE reads and writes, in its widths, and that its output can be replaced."""
    read, written, facts = sites_read(subject), sites_written(subject), context.model.facts
    taps = {hook: architecture_of(facts.model_type).tap(hook) for hook in subject.hooks if hook != RESID}
    widths = {hook: facts.d_model if hook == RESID else facts.width_of(hook) for hook in subject.hooks}
    if max(site.layer for site in (*read, *written)) >= facts.num_layers:
        raise WidthMismatch(
            f"{subject.name} writes {written[-1]}, but the model of this evaluation has {facts.num_layers} layers: "
            "give the SAE's own model with --model"
        )
    expected = tuple(sum(widths[site.hook] for site in sites) for sites in (read, written))
    if (subject.d_in, subject.sae.d_out) != expected:
        raise WidthMismatch(
            f"{subject.name} reads width {subject.d_in} and writes {subject.sae.d_out}; in this model "
            f"{', '.join(map(str, read))} and {', '.join(map(str, written))} have {expected[0]} and {expected[1]}"
        )
    hook = written[0].hook
    if hook in taps and taps[hook].take is not None:
        raise NotApplicable(
            f"{subject.name} rebuilds {hook}, which is only part of a module's output: this evaluation replaces "
            "whole outputs"
        )


@torch.inference_mode()
def _add_batch(context: Context, found: dict[LoadedSae, Seen], batch: Windows, rows: PieceSize) -> None:
    kept: dict[Site, Tensor] = {}
    sites = {site for subject in found for site in (*sites_read(subject), *sites_written(subject))}
    with context.model.tapped({site: partial(_keep, kept, site) for site in sites}):
        clean = context.model.hidden(batch.tokens)
    skipped: dict[Any, Tensor] = {}
    for subject, seen in found.items():
        read, written = sites_read(subject), sites_written(subject)
        places, bounds = places_of(subject), subject.bounds
        counts = without_massive(context, batch.keep, {place: kept[site_of(place)] for place in places}, bounds)
        seen.text.add(batch, counts)
        own = replace(batch, resid={layer: kept[Site(subject.hooks[0], layer)] for layer in subject.layers})
        acts, y_hat = subject.reconstruct(own)
        y = torch.cat([kept[site] for site in written], dim=-1)
        key = tuple(written), tuple(read), tuple(sorted(bounds.items()))
        if key not in skipped:  # the same for all SAEs of these places, with the same bounds for massive rows
            skipped[key] = _replaced(context, batch, written, torch.zeros_like(y), counts)
        replaced = _replaced(context, batch, written, y_hat.to(y), counts)
        hidden = {"skipped": skipped[key][counts], "replaced": replaced[counts]}
        targets = next_tokens(batch.tokens, batch.keep)[counts[batch.keep]]
        effects = effects_of(context.model, clean[counts], hidden, targets, rows)
        seen.add(effects, acts[counts], y[counts], y_hat[counts])


def _keep(kept: dict[Site, Tensor], site: Site, acts: Tensor) -> None:
    kept[site] = acts.clone()  # later code may change it in place


def _replaced(context: Context, batch: Windows, sites: Sequence[Site], instead: Tensor, counts: Tensor) -> Tensor:
    """[W, T, D] after the final norm, with `instead` at these sites, for tokens that count."""

    def put(part: Tensor, acts: Tensor) -> Tensor:
        return torch.where(counts[..., None], part, acts)

    parts = instead.split(instead.shape[-1] // len(sites), dim=-1)
    with context.model.tapped({site: partial(put, part) for site, part in zip(sites, parts, strict=True)}):
        return context.model.hidden(batch.tokens)


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True, tokens_only=True, residuals=False),
    summary=(
        "replacement.explained_variance",
        "replacement.l0",
        "replacement.ce_clean",
        "replacement.ce_replaced",
        "replacement.ce_skipped",
        "replacement.kl_replaced",
        "replacement.kl_skipped",
    ),
    revision=2,  # at places that the store does not hold, the SAE's own bounds say which rows are massive
)
