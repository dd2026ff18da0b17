"""SAEBench's keys, and our own, from the sums of a core evaluation.

SAEBench's keys follow its formulas exactly; our own hold what those leave out or get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .bootstrap import Statistic, intervals
from .choose_rows import Rows
from .clean_and_spliced_losses import LossSums
from .sparsity_and_variance import NAN, Sparsity, explained_variance_of, ratio, summarise_density

DECIMALS = 10
SCORES = ("ce_loss_score", "kl_div_score")
OWN_LOSSES = {"ce_loss_with_sae": "ce_sae", "kl_div_with_sae": "kl_sae"} | {name: name for name in SCORES}


def official_metrics(
    sparsity: Sparsity, losses: LossSums | None, latents: Mapping[str, Tensor], rows: Rows, context: int
) -> dict[str, dict[str, Any]]:
    """SAEBench's keys in SAEBench's order."""
    tally, density = sparsity.tally, summarise_density(latents["feature_density"])
    alive = {"frac_alive": density.pop("frac_alive")}  # the last in SAEBench's order
    cosines = ("max_encoder_cosine_sim", "max_decoder_cosine_sim")
    return {
        **official_losses(losses),
        "reconstruction_quality": {
            "explained_variance": tally.explained_variance_published,
            "explained_variance_legacy": tally.mean("explained_legacy"),
            "mse": tally.mean("mse"),
            "cossim": tally.mean("cosine"),
        },
        "shrinkage": {
            "l2_norm_in": tally.mean("norm"),
            "l2_norm_out": tally.mean("norm_hat"),
            "l2_ratio": tally.mean("norm_ratio"),
            "relative_reconstruction_bias": tally.reconstruction_bias,
        },
        "sparsity": {"l0": tally.mean("l0"), "l1": tally.mean("l1")},
        "token_stats": {
            "total_tokens_eval_reconstruction": rows.reconstruction.windows * context,
            "total_tokens_eval_sparsity_variance": rows.sparsity.windows * context,
        },
        "misc_metrics": density | {f"average_{n}": float(latents[n].double().mean()) for n in cosines} | alive,
    }


def official_losses(losses: LossSums | None) -> dict[str, dict[str, float]]:
    """Divergence and cross entropy, and their scores against zero ablation; divergences by SAEBench's formula."""
    if losses is None:
        found = dict.fromkeys(("ce", "ce_sae", "ce_clean", "ce_loss_score", "kl", "kl_sae", "kl_div_score"), NAN)
    else:
        published = {f"kl_{name}": total for name, total in losses.published.items()}
        found = losses_and_scores(losses.totals() | published, "zero")
    return {
        "model_behavior_preservation": {
            "kl_div_score": found["kl_div_score"],
            "kl_div_with_ablation": found["kl"],
            "kl_div_with_sae": found["kl_sae"],
        },
        "model_performance_preservation": {
            "ce_loss_score": found["ce_loss_score"],
            "ce_loss_with_ablation": found["ce"],
            "ce_loss_with_sae": found["ce_sae"],
            "ce_loss_without_sae": found["ce_clean"],
        },
    }


def losses_and_scores(sums: Mapping[str, Any], ablation: str, sae: str = "sae") -> dict[str, Any]:
    """Mean losses, and the SAE's scores: 1 the clean model, 0 the ablation. From sums, or arrays of resampled sums."""
    ce, ce_sae, ce_clean = (sums[f"ce_{name}"] / sums["predicting"] for name in (ablation, sae, "clean"))
    kl, kl_sae = (sums[f"kl_{name}"] / sums["tokens"] for name in (ablation, sae))
    return {
        "ce": ce,
        "ce_sae": ce_sae,
        "ce_clean": ce_clean,
        "ce_loss_score": ratio(ce - ce_sae, ce - ce_clean),
        "kl": kl,
        "kl_sae": kl_sae,
        "kl_div_score": ratio(kl - kl_sae, kl),
    }


def latent_details(latents: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    columns = [values.tolist() for values in latents.values()]
    return [
        {"index": index, **{name: round(value, DECIMALS) for name, value in zip(latents, values, strict=True)}}
        for index, values in enumerate(zip(*columns, strict=True))
    ]


def own_metrics(
    sparsity: Sparsity, losses: LossSums | None, ablations: Sequence[str], resamples: int
) -> dict[str, Any]:
    """What SAEBench leaves out or gets wrong. Massive rows are left out unless the name says otherwise."""
    every, ordinary = sparsity.tally, sparsity.ordinary
    square_of_mean = ordinary.square_of_mean
    table = sparsity.documents.table()
    variance: dict[str, Statistic] = {
        "explained_variance": lambda sums: explained_variance_of(sums, square_of_mean),
        "l0": lambda sums: sums["l0"] / sums["tokens"],
        "cossim": lambda sums: sums["cosine"] / sums["tokens"],
    }
    confidence = intervals(table, variance, resamples)
    massive = {  # rows left out of the second block
        "tokens": every.tokens - ordinary.tokens,
        "of_tokens": every.tokens,
        "share_of_squares": 1 - ratio(ordinary.sums.get("square", 0.0), every.sums.get("square", 0.0)),
    }
    ours: dict[str, Any] = {
        "explained_variance": ordinary.explained_variance,
        "explained_variance_with_massive": every.explained_variance,
        "massive": massive,
    }
    documents = {"sparsity": len(table["tokens"])}
    if losses is not None:
        kept = losses_and_scores(losses.totals(), "zero", "sae_ordinary")
        ours["massive_kept"] = {name: kept[key] for name, key in OWN_LOSSES.items()} | {"tokens": losses.massive}
        ours["ablations"] = {name: against(losses.totals(), name) for name in ablations}
        table = losses.documents.table()
        confidence |= intervals(table, LOSS_STATISTICS, resamples)
        documents["losses"] = len(table["tokens"])
    return ours | {"confidence_95": confidence, "documents": documents}


def against(sums: Mapping[str, Any], ablation: str) -> dict[str, float]:
    """Losses under one ablation and scores against it, from divergences that never underflow."""
    found = losses_and_scores(sums, ablation)
    return {"ce_loss": found["ce"], "kl_div": found["kl"]} | {name: found[name] for name in SCORES}


LOSS_STATISTICS: Mapping[str, Statistic] = {
    name: lambda sums, key=key: losses_and_scores(sums, "zero")[key] for name, key in OWN_LOSSES.items()
}
"""Those that have intervals; scores are against zero ablation."""
