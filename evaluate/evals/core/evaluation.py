"""core: how well an SAE reconstructs, how sparse it is, and what the model loses when it is spliced in.

SAEBench 0.6.0's core evaluation on the store's held-out windows: metrics under its keys follow its formulas exactly.
`saemill_metrics` adds the centred explained variance, scores against mean and resample ablation, and confidence
intervals over documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ....cache_schema.numbers_in_words import counted
from ...context.loaded_sae import layers_of
from ...context.stored_windows import tell_bounds
from ...context.write_and_read_results import INTERVALS
from ...errors import DataMissing, NotApplicable, SettingInvalid
from ...model.batches import count_windows
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, remark_of
from .bootstrap import describe_text
from .choose_rows import Rows, choose_rows
from .clean_and_spliced_losses import ABLATIONS, LossSums, measure_losses, splice_layer
from .saebench_keys import latent_details, official_metrics, own_metrics
from .sparsity_and_variance import Sparsity, measure_sparsity
from .weight_metrics import weight_metrics


@dataclass(frozen=True)
class Config:
    batch_size_prompts: int = 16
    """Windows in a batch; some of SAEBench's means depend on it."""
    n_eval_reconstruction_batches: int | None = None
    """None: 200, or what the split has room for."""
    n_eval_sparsity_variance_batches: int | None = None
    """None: 2,000, or the rest of the split."""
    split: str = "test"
    resamples: int = 1000
    """Resamples of documents, for confidence intervals; 0: none."""
    ablations: tuple[str, ...] = ABLATIONS
    """What to compare the losses with. SAEBench's is `zero`; each other one costs one more pass, once for a store."""


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    """Evaluate all SAEs side by side; those that cannot be spliced into a model get the measures that need none."""
    if "zero" not in config.ablations or set(config.ablations) - set(ABLATIONS):  # SAEBench's scores are against zero
        raise SettingInvalid(
            f"ablations: expected zero and any others of {', '.join(ABLATIONS)}, found {list(config.ablations)}"
        )
    rows = choose_rows(
        count_windows(context.store, config.split),
        config.split,
        config.batch_size_prompts,
        config.n_eval_reconstruction_batches,
        config.n_eval_sparsity_variance_batches,
    )
    if rows.sparsity.batch_windows < config.batch_size_prompts != Config().batch_size_prompts:
        asked, given = config.batch_size_prompts, rows.sparsity.batch_windows
        context.say(f"core: asked for batches of {asked} windows, but the {config.split} split has room for {given}")
    reasons = unspliceable(context, subjects)
    able = [subject for subject in subjects if subject not in reasons]
    if context.from_tokens:
        context.require_model()  # all else needs it too
    missing = context.why_no_model() if able else None
    sparsity = measure_sparsity(context, subjects, rows.sparsity)
    losses = {} if missing else measure_losses(context, able, rows.reconstruction, config.ablations)
    for subject in subjects:
        result = make_result(context, subject, config, rows, sparsity[subject], losses.get(subject))
        remark = reasons.get(subject)
        remarks = remark_of(remark, tell_bounds(context, subject, layers_of([subject])))
        yield replace(result, remark=remarks, missing=None if remark else missing)


def unspliceable(context: Context, subjects: Sequence[LoadedSae]) -> dict[LoadedSae, str]:
    """SAEs that cannot be spliced into the model, and why: their output has no single place there, or the store has no
    tokens, and so no text for the model. Without tokens, nothing can be measured with --from-tokens."""
    if context.without_tokens and context.from_tokens:
        raise DataMissing(f"{context.without_tokens}, or leave out --from-tokens")
    if context.without_tokens:
        return dict.fromkeys(subjects, f"{context.without_tokens} for the model's losses")
    reasons = {}
    for subject in subjects:
        try:
            splice_layer(subject)
        except NotApplicable as reason:
            reasons[subject] = str(reason)
    return reasons


def make_result(
    context: Context, subject: LoadedSae, config: Config, rows: Rows, sparsity: Sparsity, losses: LossSums | None
) -> Result:
    pairs = subject.width * (subject.width - 1)  # of encoder and decoder: slow for a wide SAE on a CPU
    with context.watch.stage(f"core, weights of {subject.label}", pairs, "pairs") as advance:
        of_weights = weight_metrics(subject.sae, advance)
    latents = {  # of each latent [F], by SAEBench's names and in its order
        "feature_density": sparsity.firing.density,
        "consistent_activation_heuristic": sparsity.firing.tokens_per_window,
        **of_weights,
    }
    return Result(
        subject,
        settings_by_saebench(context, rows, losses is not None),
        official_metrics(sparsity, losses, latents, rows, context.manifest.context),
        details=latent_details(latents),
        unstructured={},
        extra={"saemill_metrics": own_metrics(sparsity, losses, config.ablations, config.resamples)},
        measured_on=measured_on(config, rows, sparsity, losses),
    )


def measured_on(config: Config, rows: Rows, sparsity: Sparsity, losses: LossSums | None) -> str:
    """The text of the second block without massive rows, and of the first with them; and the batch size, if the split
    had no room for the one in the settings."""
    line = f"{config.split} split, {describe_text(sparsity.documents.table())}"
    line += "" if losses is None else f"; CE and KL on {describe_text(losses.documents.table())}"
    size = rows.sparsity.batch_windows
    return line if size == config.batch_size_prompts else f"{line}; batches of {counted(size, 'window')}"


def settings_by_saebench(context: Context, rows: Rows, has_losses: bool) -> dict[str, Any]:
    """SAEBench's settings, with the values that were used."""
    return {
        "model_name": context.name_of_model if has_losses else context.manifest.model.id,
        "llm_dtype": str(context.dtype).removeprefix("torch."),
        "batch_size_prompts": rows.sparsity.batch_windows,
        "n_eval_reconstruction_batches": rows.reconstruction.batches,
        "n_eval_sparsity_variance_batches": rows.sparsity.batches,
        "dataset": context.manifest.corpus.id,
        "context_size": context.manifest.context,
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


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True, from_tokens=True),
    intervals=INTERVALS,
    least={"batch_size_prompts": 1, "resamples": 0},
    summary=(
        "sparsity.l0",
        "saemill_metrics.explained_variance",
        "model_performance_preservation.ce_loss_score",
        "model_behavior_preservation.kl_div_score",
        "misc_metrics.frac_alive",
    ),
)
