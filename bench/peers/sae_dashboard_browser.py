"""SAEDashboard 0.8's dashboards of some latents, timed; runs in its own environment.

As in its runner for Neuronpedia at its defaults: batches of 128 latents, 32 windows at a time, the model's activations
cached on disk; then its own page of these latents. A first request fills that cache, so no round runs the model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hooked_gemma import load_hooked
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from timing_and_tables import resident
from worker_pipe import serve

BATCH, WINDOWS = 128, 32


class Maker:
    """Keeps model, SAE and tokens loaded from round to round."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def make(self, request: dict[str, Any]) -> dict[str, Any]:
        """Dashboards of the latents first..last."""
        model, sae, tokens = self._load(request)
        config = SaeVisConfig(
            hook_point=request["hook"],
            features=list(range(*request["latents"])),
            minibatch_size_features=BATCH,
            minibatch_size_tokens=WINDOWS,
            feature_centric_layout=layout(),
            cache_dir=Path(request["cache"]),
            ignore_tokens=set(request["special"]),
        )
        page = Path(request["cache"]) / "page.html"
        start = perf_counter()
        with torch.no_grad():
            data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
            save_feature_centric_vis(sae_vis_data=data, filename=page)
        seconds = perf_counter() - start
        titles = [latent.acts_histogram_data.title for latent in data.feature_data_dict.values()]
        shares = [float(title.rpartition(" = ")[2].rstrip("%")) / 100 for title in titles]
        return {"seconds": seconds, "densities": shares, "bytes": page.stat().st_size, "peak": resident("VmHWM")}

    def _load(self, request: dict[str, Any]) -> tuple[Any, Any, torch.Tensor]:
        if not self._loaded:
            model = load_hooked(Path(request["model"]))
            model.tokenizer = PreTrainedTokenizerFast.from_pretrained(request["model"])
            self._loaded = {"model": model, "tokens": load_file(request["tokens"])["tokens"]}
        if request["sae"] not in self._loaded:
            sae = SAE.load_from_disk(request["sae"], device="cpu")
            # The decoder's rows have norm 1. SAEDashboard folds norms anyway, which SAELens refuses for top-k.
            sae.fold_W_dec_norm = lambda: None
            self._loaded[request["sae"]] = sae
        return self._loaded["model"], self._loaded[request["sae"]], self._loaded["tokens"]


def layout() -> SaeVisLayoutConfig:
    """The layout that its runner for Neuronpedia uses."""
    sequences = SequencesConfig(
        stack_mode="stack-all",
        buffer=None,
        compute_buffer=True,
        n_quantiles=5,
        top_acts_group_size=20,
        quantile_group_size=5,
    )
    others = (ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), FeatureTablesConfig(n_rows=3))
    return SaeVisLayoutConfig(columns=[Column(sequences, *others)])


if __name__ == "__main__":
    serve(Maker().make)
