"""The end of a run: measure its SAEs in one pass over held-out text, save them, and write result.json.

B rows, D residual width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.massive_activations import Massive
from ...cache_schema.sites import RESID, SAE_LENS_NAMES, key_of
from ...cache_schema.strict_json import from_json, to_json
from ..config.run_config import Member
from ..data.batch_stream import held_out
from ..data.drawn_rows import Draw
from ..data.scaling import bounds_of
from ..disk.sae_lens_folder import NORM_BOUNDS, save_sae
from ..disk.write_and_load_checkpoints import keep_newest, path_of
from ..engine.fleet_of_saes import Fleet, say_all_diverged, say_diverged
from ..errors import TrainingDiverged
from ..parallel.processes import all_or_none
from ..sae.kernels.dense_products import product_on
from ..sae.side_inputs import Side
from .preflight import held_out_rows
from .run_folder import name_failure
from .start_or_resume import Run

DIVERGED = "its reconstruction of held-out text is not finite: training diverged in the last steps"
ROUNDING = 1e-12  # error of a difference of float64 sums, as a share of the squares


@dataclass
class Tally:
    """Sums over tokens, in float64, from which the results are computed. `total` is the sum of all targets [D]."""

    tokens: int = 0
    active: float = 0.0
    squared_error: float = 0.0
    squares: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, target: Tensor, x_hat: Tensor, active: Tensor) -> None:
        """`active` [B]: the number of active latents of each row."""
        exact = target.double()
        self.tokens += len(target)
        self.active += float(active.sum())
        self.squared_error += float((exact - x_hat.double()).square().sum())
        self.squares += float(exact.square().sum())
        self.total = self.total.to(target.device) + exact.sum(dim=0)

    @property
    def l0(self) -> float:
        """Mean number of active latents of a token."""
        return self.active / max(self.tokens, 1)

    @property
    def explained_variance(self) -> float | None:
        """1 - E||x - x_hat||^2 / E||x - mean||^2 over all tokens; None if they are all alike, or there are none."""
        variance = self.squares - float(self.total.square().sum()) / max(self.tokens, 1)
        return 1.0 - self.squared_error / variance if variance > ROUNDING * self.squares else None


@dataclass
class HeldOut:
    """Measurements of one SAE: on ordinary rows, and on all rows including massive ones."""

    ordinary: Tally = field(default_factory=Tally)
    every: Tally = field(default_factory=Tally)

    def add(self, target: Tensor, x_hat: Tensor, active: Tensor, is_ordinary: Tensor) -> None:
        self.every.add(target, x_hat, active)
        self.ordinary.add(target[is_ordinary], x_hat[is_ordinary], active[is_ordinary])

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.every.squared_error)


@dataclass(frozen=True)
class SaeOutcome:
    folder: str
    variant: str
    width: int
    l0: float
    explained_variance: float | None
    """None if held-out rows are all alike: there is no variance to explain."""
    dead_latents: int
    dead_share: float
    loss: float | None
    """Of the last step; None if the run was resumed after that."""
    validation_tokens: int
    """Tokens behind `l0` and `explained_variance`, without massive rows."""
    validation_massive: int = 0
    explained_variance_with_massive: float | None = None
    """With massive rows, if there are any."""
    l0_with_massive: float | None = None
    step_seconds: float | None = None
    """Mean time of a step since the run was last resumed, alongside its other SAEs; None on a GPU."""
    state_bytes: int | None = None
    """Size in a checkpoint: weights, optimiser state and everything else."""
    cut_short: tuple[tuple[int, int], ...] = ()
    """Warm-ups and onsets that the run was too short for: steps requested and steps taken."""
    encoder_product: str | None = None
    """Precision of the encoder's products, which is the requested one if the hardware has it."""


@dataclass(frozen=True)
class Outcome:
    run: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_wait_seconds: float
    waiting_share: float
    same_document_share: float
    same_document_ideal: float
    same_document_ratio: float
    saes: dict[str, SaeOutcome]
    massive: dict[str, dict[str, float]] = field(default_factory=dict)
    """The massive rows left out of each layer; empty if every row counts."""
    diverged: dict[str, str] = field(default_factory=dict)
    """SAEs that have no folder and no numbers, and why."""

    def say_held_out(self) -> str:
        """The text that L0 and explained variance are measured on: a range if SAEs leave out different rows."""
        kinds = {(sae.validation_tokens, sae.validation_massive) for sae in self.saes.values()}
        fewest, massive = min(kinds)
        most = f" to {max(kinds)[0]:,}" if len(kinds) > 1 else ""
        left_out = f", {massive:,} massive rows left out" if massive else ""
        return f"{fewest:,}{most} tokens of the store's validation split{left_out}"

    def say_diverged(self) -> str:
        """Which SAEs diverged; empty if none has."""
        each = "; ".join(f"{label}: {reason}" for label, reason in self.diverged.items())
        return each and f"{each}. The other SAEs of {self.run} are complete: try again with a lower learning rate"


def conclude(run: Run) -> Outcome | None:
    """Measure and save the SAEs, and write the results; rank 0 returns them."""
    own: dict[str, Any] = {}
    is_first_of_team = run.process.team.rank == 0  # the others wait
    run.feed.close()  # held-out text needs as much memory as it holds
    for trainee in run.fleet.trainees.values():
        trainee.replays.end()
    with run.fleet.gather_weights():
        with all_or_none(run.process.group):
            measured = _measure(run) if is_first_of_team else {}
            run.require_folder()
        with all_or_none(run.process.group):
            if is_first_of_team:
                own = {label: say_diverged(step) for label, step in run.fleet.diverged.items()} | _save(run, measured)
    found = run.process.collect(own, run.labels)
    with all_or_none(run.process.group):
        diverged = {label: raw for label, raw in found.items() if isinstance(raw, str)}
        if len(diverged) == len(found):  # raised in every process
            raise TrainingDiverged(say_all_diverged(diverged))
        if not run.process.is_first:
            return None
        saes = {label: from_json(SaeOutcome, raw, label) for label, raw in found.items() if label not in diverged}
        outcome = _outcome(run, saes, diverged)
        run.require_folder()
        run.folder.write_result(to_json(outcome))
        last = path_of(run.folder.checkpoints, run.total_steps)
        keep_newest(run.folder.checkpoints, 1, last)  # a checkpoint is three times as large as the SAEs
        return outcome


def _measure(run: Run) -> dict[str, HeldOut]:
    """The SAEs of this process on held-out text, except those that have diverged."""
    course = run.config.course
    rows = held_out_rows(run.config, run.store.manifest, course.shard_width and run.process.team.size > 1)
    needs, stats = run.fleet.needs.values(), run.fleet.stats
    batches = held_out(run.store, needs, stats, run.process.device, tokens=course.validation_tokens, batch_tokens=rows)
    return validate(run.fleet, batches)


@torch.no_grad()
def validate(fleet: Fleet, draws: Iterable[Draw]) -> dict[str, HeldOut]:
    """Measure every SAE that has not diverged, with the codes that the saved SAE computes."""
    found = {label: HeldOut() for label in fleet.training}
    for draw in draws:
        for label, trainee in fleet.training.items():
            batch = draw.batch(fleet.needs[label])
            side = Side(batch.side, trainee.assembly.knobs_at(trainee.total_steps, trainee.total_steps))
            acts = trainee.sae.encode(batch.x, side)
            active = torch.linalg.vector_norm(acts, 0, dim=1)  # `count_nonzero` would allocate a table of int64
            x_hat = trainee.sae.skip(batch.x, trainee.sae.decode(acts))
            target = batch.x if batch.target is None else batch.target
            found[label].add(target, x_hat, active, draw.ordinary(fleet.needs[label]))
    return found


def _save(run: Run, measured: Mapping[str, HeldOut]) -> dict[str, Any]:
    """Save the SAEs of this process; return the outcome of each as JSON, or why there is none."""
    results: dict[str, Any] = {}
    for member in run.config.members:
        if member.label not in measured:
            continue
        if not measured[member.label].is_finite:
            results[member.label] = DIVERGED
            continue
        outcome = _sae_outcome(run, member, measured[member.label])
        run.require_folder()
        with name_failure(run.folder.path, member.label):
            trainee = run.fleet.trainees[member.label]
            save_sae(
                Path(outcome.folder),
                trainee.sae,
                trainee.assembly.input_stats,
                metadata_of(run, member, outcome),
                to_json(member.config),
                member.variant,
                trainee.assembly.target_stats,
                trainee.assembly.knobs_at(run.total_steps, run.total_steps),
            )
        results[member.label] = to_json(outcome)
    return results


def _outcome(run: Run, saes: dict[str, SaeOutcome], diverged: dict[str, str]) -> Outcome:
    watch, quality = run.watch, run.watch.quality
    tokens = round(run.total_steps * run.feed.batch_tokens)
    return Outcome(
        run=run.folder.name,
        steps=run.total_steps,
        tokens=tokens,
        seconds=watch.seconds,
        tokens_per_second=tokens / watch.seconds if watch.seconds else 0.0,
        first_wait_seconds=run.feed.loader.first_wait_seconds,
        waiting_share=watch.waiting_share,
        same_document_share=quality.share,
        same_document_ideal=quality.ideal,
        same_document_ratio=quality.ratio,
        saes=saes,
        massive={key_of(layer): _massive_rows(one.massive) for layer, one in run.fleet.stats.items() if one.massive},
        diverged=diverged,
    )


def _massive_rows(found: Massive) -> dict[str, float]:
    return {
        "multiple": found.multiple,
        "median_norm": found.median,
        "norm_bound": found.bound,  # rows beyond it are massive
        "tokens": found.rows,  # in the sample
        "massive": found.massive,
        "share_of_squares": found.square_share,
    }


def _sae_outcome(run: Run, member: Member, found: HeldOut) -> SaeOutcome:
    tally, every = found.ordinary, found.every
    massive = every.tokens - tally.tokens
    trainee = run.fleet.trainees[member.label]
    dead = trainee.counters.dead(trainee.assembly.dead_after_tokens)
    return SaeOutcome(
        folder=str(run.folder.path / member.label),
        variant=member.variant,
        width=trainee.sae.num_latents,
        l0=tally.l0,
        explained_variance=tally.explained_variance,
        dead_latents=int(dead.sum()),
        dead_share=float(dead.double().mean()),
        loss=run.watch.last.get(member.label, {}).get("loss"),
        validation_tokens=tally.tokens,
        validation_massive=massive,
        explained_variance_with_massive=every.explained_variance if massive else None,
        l0_with_massive=every.l0 if massive else None,
        step_seconds=run.fleet.step_seconds(member.label),
        state_bytes=trainee.state_bytes,
        cut_short=tuple(trainee.assembly.cut_short(run.total_steps)),
        encoder_product=product_on(run.process.device, trainee.sae.encoder_product),
    )


def metadata_of(run: Run, member: Member, outcome: SaeOutcome) -> dict[str, Any]:
    """What the SAE was trained on and how good it is, under the names that other tools expect."""
    manifest, needs = run.store.manifest, member.config.needs()
    taken = run.feed.plan.windows_taken() if needs.windows else 1.0
    to_hook = needs.to_hook or needs.hook
    hooks = {"hook_name": f"blocks.{needs.inputs[-1]}.{SAE_LENS_NAMES[needs.hook]}"}
    if needs.targets is not None:
        hooks["hook_name_out"] = f"blocks.{needs.targets[-1]}.{SAE_LENS_NAMES[to_hook]}"
    if {needs.hook, to_hook} != {RESID}:
        hooks |= {"hook": needs.hook, "target_hook": to_hook}
    return {
        "model_name": manifest.model.id,
        "model_revision": manifest.model.revision,
        "model_class_name": "HookedTransformer",
        **hooks,
        "hook_head_index": None,
        "context_size": manifest.context,
        "prepend_bos": manifest.model.bos_token is not None,
        "dataset_path": manifest.corpus.id,
        "exclude_special_tokens": True,
        "seqpos_slice": [None],
        "layers": list(needs.inputs),
        "target_layers": list(needs.inputs if needs.targets is None else needs.targets),
        "cache_id": manifest.cache_id,
        "training_tokens": round(run.total_steps * run.config.data.batch_tokens * taken),
        "training_architecture": member.variant,
        "l0": outcome.l0,
        "explained_variance": outcome.explained_variance,
        "validation_tokens": outcome.validation_tokens,
        "validation_massive": outcome.validation_massive,
        NORM_BOUNDS: {key_of(layer): bound for layer, bound in bounds_of(run.fleet.stats).items()},
    }
