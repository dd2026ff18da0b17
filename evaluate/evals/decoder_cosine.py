"""decoder_cosine: do latents write in directions of their own, and does another seed find the same ones?

From the weights alone: no store, no model. The largest cosine of each latent's decoder row with another one's: an SAE
whose latents were split or found twice has many near 1. The same against SAEs of the same run that differ only by their
seed shows how much of a dictionary is due to the data, and how much to chance. The baseline for both is the same number
of random directions. F latents, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.strict_json import to_json
from ...train.disk.plain_form import without_signs
from ...train.disk.sae_lens_folder import TENSORS, WEIGHTS, read_config, read_tensor
from ...train.errors import TrainError
from ...train.run.find_and_load_sae import list_saes, read_folder
from .core.weight_metrics import max_cosine
from .evaluation_contract import Context, Evaluation, LoadedSae, Needs, Result, remark_of


@dataclass(frozen=True)
class Config:
    threshold: float = 0.9
    """Latents with a neighbour at least this near count as doubled."""
    shared_threshold: float = 0.7
    """Latents with a neighbour at least this near in another seed's dictionary count as shared."""
    seed: int = 51_866
    """Seed of the random directions; not a small one, which may have initialised a dictionary."""


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result]:
    for subject in subjects:
        rows_FD = subject.sae.W_dec.detach().float()
        metrics = {"decoder_cosine": within(rows_FD, config)} if len(rows_FD) > 1 else {}
        remarks = list[str]()
        alike = across(rows_FD, other_seeds(subject, remarks), config)
        if len(rows_FD) < 2:
            remarks.append("an SAE of one latent has no pair of latents to compare")
        if alike:
            metrics["across_seeds"] = alike
        else:
            remarks.append("its run has no SAE that differs by its seed alone")
        yield Result(subject, to_json(config), metrics, remark=remark_of(*remarks), measured_on="weights alone")


def within(rows_FD: Tensor, config: Config) -> dict[str, float]:
    """Statistics over latents, each with its nearest neighbour."""
    nearest_F = max_cosine(rows_FD).double()
    return {
        "mean": float(nearest_F.mean()),
        "median": float(nearest_F.median()),
        "max": float(nearest_F.max()),
        "doubled_share": float((nearest_F >= config.threshold).double().mean()),
        "mean_chance": float(max_cosine(_random_like(rows_FD, config)).double().mean()),
    }


def across(rows_FD: Tensor, others: Iterable[Tensor], config: Config) -> dict[str, float]:
    """Statistics over latents, each with its nearest of another seed; means over the other seeds. Empty without any."""
    means, shares, chance = list[float](), list[float](), math.nan
    for other in others:
        if not means:
            chance = float(max_cosine(rows_FD, _random_like(other, config)).double().mean())
        nearest_F = max_cosine(rows_FD, other).double()
        means.append(float(nearest_F.mean()))
        shares.append(float((nearest_F >= config.shared_threshold).double().mean()))
        del other  # before the next one is read
    if not means:
        return {}
    return {"seeds": float(1 + len(means)), "mean": fmean(means), "shared_share": fmean(shares), "mean_chance": chance}


def other_seeds(subject: LoadedSae, remarks: list[str]) -> Iterator[Tensor]:
    """Decoder rows of the SAEs next to this one that were trained alike from another seed, one after the other; adds
    those that cannot be read to `remarks`."""
    own = _all_but_seed(subject.config)
    for folder in list_saes(subject.folder.resolve().parent) if own is not None else ():
        try:
            if folder != subject.folder.resolve() and _all_but_seed(config := read_config(folder)) == own:
                yield _decoder_of(folder, config).to(subject.sae.W_dec)
        except (TrainError, OSError) as error:
            remarks.append(f"without {folder.name}, which cannot be read: {error}")


def _decoder_of(folder: Path, config: Mapping[str, Any]) -> Tensor:
    """The decoder rows of an SAE. No other tensor is read if its file has them as evaluations use them."""
    architecture = config.get("gate", config.get("architecture"))
    is_plain = architecture in TENSORS and not config.get("rescale_acts_by_decoder_norm")
    if is_plain and architecture != "abstopk":
        return read_tensor(folder / WEIGHTS, "W_dec")
    return without_signs(read_folder(folder)).W_dec.detach()


def _all_but_seed(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What SAEs that differ only by their seed have in common; None if no seed was recorded."""
    metadata = config.get("metadata", {})
    settings = dict(metadata.get("training_architecture_details") or {})
    if settings.pop("seed", None) is None:
        return None
    return metadata.get("training_architecture"), metadata.get("cache_id"), config.get("d_in"), settings


def _random_like(rows_FD: Tensor, config: Config) -> Tensor:
    return torch.randn(rows_FD.shape, generator=torch.Generator().manual_seed(config.seed)).to(rows_FD)


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(residuals=False),
    summary=(
        "decoder_cosine.mean",
        "decoder_cosine.mean_chance",
        "decoder_cosine.doubled_share",
        "across_seeds.shared_share",
    ),
)
