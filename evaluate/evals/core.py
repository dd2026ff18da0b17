"""core: how well an SAE reconstructs, how sparse it is, and what the model loses when it is spliced in.

SAEBench 0.6.0's core evaluation on the store's held-out windows.

1. Losses of the model on the first block of rows: clean, with the reconstruction, ablated.
2. Sparsity and variance on the second block; needs no model.
3. Bias, norms and cosines of each latent, from the weights.

Metrics under SAEBench's keys are SAEBench's formulas to the letter. `saemill_metrics` adds the centred
explained variance, scores against mean and resample ablation, and confidence intervals over documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..baselines import ABLATIONS
from ..errors import ModelMissing, NotApplicable, SettingInvalid
from ..losses import LossSums, measure_losses, splice_layer
from ..metrics.bootstrap import Statistic, intervals
from ..metrics.quality import explained_variance_of, summarise_density
from ..metrics.weights import weight_metrics
from ..needs import Needs
from ..results import Failure, Result
from ..rows import Rows, rows_of
from ..scene import Scene
from ..sparsity import Sparsity, measure_sparsity
from ..subject import Subject

NEEDS = Needs(store=True)
SUMMARY = (
    "sparsity.l0",
    "saemill_metrics.explained_variance",
    "model_performance_preservation.ce_loss_score",
    "model_behavior_preservation.kl_div_score",
    "misc_metrics.frac_alive",
)
DECIMALS = 10
NAN = float("nan")


@dataclass(frozen=True)
class Config:
    batch_size_prompts: int = 16
    """Windows in a batch; a part of the definition of some of SAEBench's means."""
    n_eval_reconstruction_batches: int | None = None
    """None: 200, or what the split has room for."""
    n_eval_sparsity_variance_batches: int | None = None
    """None: 2,000, or the rest of the split."""
    split: str = "test"
    resamples: int = 1000
    """Of documents, for confidence intervals."""
    ablations: tuple[str, ...] = ABLATIONS
    """What to set the losses against; SAEBench's is `zero`, the others cost one more pass each, once for a store."""


def evaluate(scene: Scene, subjects: Sequence[Subject], config: Config) -> Iterator[Result | Failure]:
    """All SAEs side by side; those that no model can be spliced with get the measures that need none."""
    require_ablations(config.ablations)
    rows = rows_of(
        scene,
        config.split,
        config.batch_size_prompts,
        config.n_eval_reconstruction_batches,
        config.n_eval_sparsity_variance_batches,
    )
    reasons, missing = unspliceable(subjects), missing_model(scene)
    able = [subject for subject in subjects if subject not in reasons]
    sparsity = measure_sparsity(scene, subjects, rows.sparsity)
    losses = {} if missing else measure_losses(scene, able, rows.reconstruction, config.ablations)
    for subject in subjects:
        yield make_result(scene, subject, config, rows, sparsity[subject], losses.get(subject), reasons, missing)


def require_ablations(ablations: Sequence[str]) -> None:
    """Known ones, and the one that SAEBench's scores are about."""
    if "zero" not in ablations or set(ablations) - set(ABLATIONS):
        raise SettingInvalid(f"ablations: expected zero and others of {', '.join(ABLATIONS)}, found {list(ablations)}")


def unspliceable(subjects: Sequence[Subject]) -> dict[Subject, str]:
    """SAEs that have no one place in the model, and why."""
    reasons = {}
    for subject in subjects:
        try:
            splice_layer(subject)
        except NotApplicable as reason:
            reasons[subject] = str(reason)
    return reasons


def missing_model(scene: Scene) -> str | None:
    """Why the losses of the model cannot be measured, if so. From tokens, nothing can be."""
    if scene.manifest.corpus.settings.get("tokens") is False:
        return f"{scene.store.url} was imported without tokens: import it again with --tokens for the model's losses"
    try:
        _ = scene.model
    except ModelMissing as error:
        if scene.from_tokens:
            raise
        return str(error)
    return None


def make_result(
    scene: Scene,
    subject: Subject,
    config: Config,
    rows: Rows,
    sparsity: Sparsity,
    losses: LossSums | None,
    reasons: Mapping[Subject, str],
    missing: str | None,
) -> Result:
    """The document of one SAE."""
    latents = {
        "feature_density": sparsity.firing.density,
        "consistent_activation_heuristic": sparsity.firing.tokens_per_window,
        **weight_metrics(subject.sae),
    }
    ours = own_metrics(sparsity, losses, config)
    if subject in reasons:
        ours["not_applicable"] = {"losses": reasons[subject]}
    return Result(
        subject,
        official_config(scene, rows, losses is not None),
        official_metrics(sparsity, losses, latents, rows, scene.manifest.context),
        details=latent_details(latents),
        unstructured={},
        extra={"saemill_metrics": ours},
        missing=None if subject in reasons else missing,
    )


def official_config(scene: Scene, rows: Rows, has_losses: bool) -> dict[str, Any]:
    """SAEBench's settings as they were used."""
    return {
        "model_name": scene.manifest.model.id,
        "llm_dtype": str(scene.dtype).removeprefix("torch."),
        "batch_size_prompts": rows.sparsity.batch_windows,
        "n_eval_reconstruction_batches": rows.reconstruction.batches,
        "n_eval_sparsity_variance_batches": rows.sparsity.batches,
        "dataset": scene.manifest.corpus.id,
        "context_size": scene.manifest.context,
        "compute_kl": has_losses,
        "compute_ce_loss": has_losses,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }


def official_metrics(
    sparsity: Sparsity, losses: LossSums | None, latents: Mapping[str, Tensor], rows: Rows, context: int
) -> dict[str, dict[str, Any]]:
    """SAEBench's keys in SAEBench's order."""
    tally = sparsity.tally
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
        "misc_metrics": official_misc(latents),
    }


def official_losses(losses: LossSums | None) -> dict[str, dict[str, float]]:
    """Divergence and cross entropy, and their scores against zero ablation."""
    if losses is None:
        kl = kl_sae = ce = ce_sae = ce_clean = NAN
    else:
        sums = losses.totals()
        kl, kl_sae = (losses.published[name] / sums["tokens"] for name in ("zero", "sae"))
        ce, ce_sae, ce_clean = (sums[f"ce_{name}"] / sums["predicting"] for name in ("zero", "sae", "clean"))
    return {
        "model_behavior_preservation": {
            "kl_div_score": ratio(kl - kl_sae, kl),
            "kl_div_with_ablation": kl,
            "kl_div_with_sae": kl_sae,
        },
        "model_performance_preservation": {
            "ce_loss_score": ratio(ce - ce_sae, ce - ce_clean),
            "ce_loss_with_ablation": ce,
            "ce_loss_with_sae": ce_sae,
            "ce_loss_without_sae": ce_clean,
        },
    }


def official_misc(latents: Mapping[str, Tensor]) -> dict[str, float]:
    found = summarise_density(latents["feature_density"])
    for part in ("encoder", "decoder"):
        found[f"average_max_{part}_cosine_sim"] = float(latents[f"max_{part}_cosine_sim"].double().mean())
    order = (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    )
    return {name: found[name] for name in order}


def latent_details(latents: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One object for each latent."""
    order = (
        "feature_density",
        "consistent_activation_heuristic",
        "encoder_bias",
        "encoder_norm",
        "encoder_decoder_cosine_sim",
        "max_decoder_cosine_sim",
        "max_encoder_cosine_sim",
    )
    columns = [latents[name].tolist() for name in order]
    return [
        {"index": index, **{name: round(value, DECIMALS) for name, value in zip(order, values, strict=True)}}
        for index, values in enumerate(zip(*columns, strict=True))
    ]


def own_metrics(sparsity: Sparsity, losses: LossSums | None, config: Config) -> dict[str, Any]:
    """What SAEBench does not say, or says wrongly."""
    square_of_mean = sparsity.tally.square_of_mean
    table = sparsity.documents.table()
    variance: dict[str, Statistic] = {
        "explained_variance": lambda sums: explained_variance_of(sums, square_of_mean),
        "l0": lambda sums: sums["l0"] / sums["tokens"],
        "cossim": lambda sums: sums["cosine"] / sums["tokens"],
    }
    confidence = intervals(table, variance, config.resamples)
    ours: dict[str, Any] = {"explained_variance": sparsity.tally.explained_variance}
    if losses is not None:
        ours["ablations"] = {name: against(losses.totals(), name) for name in config.ablations}
        confidence |= intervals(losses.documents.table(), loss_statistics(), config.resamples)
    return ours | {"confidence_95": confidence, "documents": {"sparsity": len(next(iter(table.values()), ()))}}


def against(sums: Mapping[str, Any], ablation: str) -> dict[str, float]:
    """Losses under an ablation, and the SAE's scores with it as zero; divergences that never underflow."""
    ce, ce_sae, ce_clean = (sums[f"ce_{name}"] / sums["predicting"] for name in (ablation, "sae", "clean"))
    kl, kl_sae = (sums[f"kl_{name}"] / sums["tokens"] for name in (ablation, "sae"))
    return {
        "ce_loss": ce,
        "kl_div": kl,
        "ce_loss_score": ratio(ce - ce_sae, ce - ce_clean),
        "kl_div_score": ratio(kl - kl_sae, kl),
    }


def loss_statistics() -> dict[str, Statistic]:
    return {
        "ce_loss_with_sae": lambda sums: sums["ce_sae"] / sums["predicting"],
        "kl_div_with_sae": lambda sums: sums["kl_sae"] / sums["tokens"],
        "ce_loss_score": lambda sums: (sums["ce_zero"] - sums["ce_sae"]) / (sums["ce_zero"] - sums["ce_clean"]),
        "kl_div_score": lambda sums: 1 - sums["kl_sae"] / sums["kl_zero"],
    }


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else NAN
