"""attention: how well attention explains codes, and what an SAE does to attention.

Contribution by layer: how much of the similarity of two tokens' codes the stored attention of each layer explains,
beyond their nearness. Attention fidelity: the residual after layer L is replaced by its reconstruction, layer L + 1
computes its attention from that, and its rows are compared with the stored ones (KL). From the true residual they
differ only by rounding; mean and zero ablation are the other extreme. Causal tracing: what a latent at the token that
layer L + 1 attends to most does to the same latent at the attending token.

W windows, H heads, T context, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cache_schema.strict_json import to_json
from ...harvest.sparsify_attention import sinks
from ...train.data.batch import AttentionRows
from ..context.stored_windows import TextCount, mean_of_rows, ordinary_rows, read_windows, say_if_fewer
from ..errors import NotApplicable
from ..model.batches import Windows
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .measures.attention import Explained, Traced, attention_divergence, choose_pairs, explain, trace_pairs

TOP_LAYER = "attention fidelity needs a layer above the SAE's, and the model has none"


@dataclass(frozen=True)
class Config:
    windows: int = 64
    """Of the test split."""
    batch_windows: int = 16
    trace_windows: int = 16
    """How many of these have latents traced along attention; 0: none."""
    trace_pairs: int = 4
    """Pairs traced in each such window, the strongest ones."""


@dataclass(eq=False)
class Seen:
    explained: Explained
    divergence: dict[str, float] = field(default_factory=dict)  # sums over rows, by what replaced the residual
    agreement: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    traced: Traced = field(default_factory=Traced)
    text: TextCount = field(default_factory=TextCount)

    def compare(self, name: str, stored_WHTT: Tensor, found_WHTT: Tensor, keep_WT: Tensor) -> None:
        """Add the rows of kept queries."""
        rows = keep_WT[:, None, :].expand(stored_WHTT.shape[:3])
        kl = attention_divergence(stored_WHTT, found_WHTT)[rows].sum()
        agrees = (stored_WHTT.argmax(-1) == found_WHTT.argmax(-1))[rows].sum()
        self.divergence[name] = self.divergence.get(name, 0.0) + float(kl)
        self.agreement[name] = self.agreement.get(name, 0.0) + float(agrees)


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    layers = context.manifest.attention.layers
    if not layers:
        raise NotApplicable("the store holds no attention: harvest again with --attention-layers")
    say_if_fewer(context, "attention", config)
    seen = {subject: Seen(Explained.none(len(layers), context.device)) for subject in subjects}
    impossible, missing = obstacles(context, subjects)
    able = {subject for subject in subjects if missing is None and subject not in impossible}
    means = {at: mean_of_rows(context, at).to(context.device, torch.float32) for at in {one.layer for one in able}}
    windows = 0
    for batch in read_windows(
        context, subjects, "attention", config.windows, config.batch_windows, attention_layers=layers
    ):
        stored = {layer: dense_rows(batch.attention[layer]) for layer in layers}
        averaged = torch.stack([stored[layer].mean(1) for layer in layers])
        for subject in subjects:
            acts, x_hat = subject.reconstruct(batch)
            rows = ordinary_rows(context, subject, batch)
            seen[subject].text.add(batch, rows)
            seen[subject].explained += explain(acts, averaged, rows, batch.documents)
            if subject in able:
                given = {"sae": x_hat, "mean_ablation": means[subject.layer]}
                compare_attention(context, subject, batch, rows, given, stored[subject.layer + 1], seen[subject])
            share = batch.slice(0, max(0, config.trace_windows - windows))  # whatever the batch size
            if subject in able and (count := len(share)):
                links = stored[subject.layer + 1][:count].mean(1)
                pairs = choose_pairs(links, rows[:count], config.trace_pairs, share.documents)
                above = partial(context.model.attention, layer=subject.layer)
                seen[subject].traced += trace_pairs(subject, share, acts[:count], pairs, above)
        windows += len(batch)
    for subject in subjects:
        metrics = {"contribution": contribution(seen[subject], layers), "fidelity": fidelity(seen[subject])}
        metrics["tracing"] = seen[subject].traced.metrics() if subject in able else {}
        remark = impossible.get(subject)
        still_missing = None if remark else missing
        text = seen[subject].text.and_traced(config.trace_windows if subject in able else 0)
        yield Result(subject, to_json(config), metrics, remark=remark, missing=still_missing, measured_on=text)


def obstacles(context: Context, subjects: Sequence[LoadedSae]) -> tuple[dict[LoadedSae, str], str | None]:
    """Why some SAEs' attention fidelity can never be measured on this store, and what is missing for the others'."""
    stored, reason = context.manifest.attention.layers, context.why_no_model()
    depth = context.manifest.model.num_layers if reason else context.model.facts.num_layers
    impossible = {}
    for subject in subjects:
        if not subject.is_single_layer:
            impossible[subject] = "attention fidelity is only for SAEs that read and write one layer"
        elif depth is not None and subject.layer + 1 >= depth:
            impossible[subject] = TOP_LAYER
        elif subject.layer + 1 not in stored:
            held = ", ".join(map(str, stored))
            impossible[subject] = f"attention fidelity needs layer {subject.layer + 1}; the store holds layers {held}"
    return impossible, reason and f"attention fidelity needs the model: {reason}"


def compare_attention(
    context: Context,
    subject: LoadedSae,
    batch: Windows,
    rows_WT: Tensor,
    given: Mapping[str, Tensor],
    stored_WHTT: Tensor,
    seen: Seen,
) -> None:
    """Compare the next layer's attention from the true residual, from those given instead, and from zeros."""
    true = batch.resid[subject.layer].float()
    left_out = sinks(context.manifest.attention, batch.context, true.device)
    seen.rows += int(rows_WT.sum()) * stored_WHTT.shape[1]
    for name, resid in {"true": true, **given, "zero_ablation": torch.zeros_like(true)}.items():
        replaced = torch.where(rows_WT[:, :, None], resid, true)
        found = next_attention(context, replaced, subject.layer, averaged=stored_WHTT.shape[1] == 1)
        seen.compare(name, stored_WHTT, found.masked_fill(left_out, 0), rows_WT)


def next_attention(context: Context, resid_WTD: Tensor, layer: int, averaged: bool) -> Tensor:
    """Attention [W, H, T, T] of the layer after `layer`, averaged over heads if the store's is."""
    blocks: list[Tensor] = []

    def keep(probs_WHTT: Tensor) -> None:
        blocks.append(probs_WHTT.float().mean(1, keepdim=True) if averaged else probs_WHTT.float())

    context.model.attention(resid_WTD, layer, keep)
    return torch.cat(blocks)


def dense_rows(rows: AttentionRows) -> Tensor:
    """[W, H, T, T]: stored rows, zero where nothing was kept."""
    windows, heads, context = rows.kept_mass.shape
    dense = rows.data.new_zeros(windows * heads * context, context)
    row = torch.repeat_interleave(torch.arange(len(dense), device=dense.device), rows.indptr.diff())
    dense[row, rows.indices] = rows.data
    return dense.view(windows, heads, context, context)


def contribution(seen: Seen, layers: Sequence[int]) -> dict[str, Any]:
    """R^2 that each layer adds beyond nearness, its R^2 alone, and how much more alike attended tokens are."""
    explained = seen.explained
    shares = explained.contributions()
    found: dict[str, Any] = {"nearness": explained.nearness(), "total": sum(shares)}
    for layer, share, alone, gain in zip(layers, shares, explained.alone(), explained.similarity_gain(), strict=True):
        found |= {f"share_{layer}": share, f"alone_{layer}": alone, f"similarity_gain_{layer}": gain}
    return found


def fidelity(seen: Seen) -> Mapping[str, float]:
    """Mean KL of a row in nats; `score` is 1 at the true residual and 0 at mean ablation."""
    if not seen.rows:
        return {}
    kl = {name: total / seen.rows for name, total in seen.divergence.items()}
    found = {f"kl_{name}": value for name, value in kl.items()}
    found |= {f"same_favourite_{name}": total / seen.rows for name, total in seen.agreement.items()}
    room = kl["mean_ablation"] - kl["true"]
    found["score"] = (kl["mean_ablation"] - kl["sae"]) / room if room > 0 else float("nan")
    return found


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=(
        "contribution.total",
        "fidelity.score",
        "fidelity.kl_sae",
        "tracing.change_attended",
        "tracing.change_unattended",
    ),
    least={"trace_windows": 0, "trace_pairs": 0},
    revision=2,  # pairs lie in one document, and as many windows are traced as requested
)
