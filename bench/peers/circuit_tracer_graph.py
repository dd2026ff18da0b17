"""Exported transcoders in circuit-tracer: what they rebuild, an attribution graph, the model with all MLPs replaced.

circuit-tracer asks the Hub for transcoders, even for those in a folder, so the folder is put into a Hub cache and read
offline by `load_transcoder_from_hub`. Its `from_pretrained` knows models by TransformerLens' list of names, so the
model is made by `ReplacementModel.from_config`, as in its own tests, and given the weights of the model's folder.

L layers, N tokens, D width, F latents.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import AutoTokenizer, Gemma2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hooked_gemma import make_config
from worker_pipe import serve

COMMIT = "0" * 40
CPU = torch.device("cpu")


def load_transcoders(folder: Path) -> Any:
    """Load with circuit-tracer's own code, from a repository that is only in the Hub's cache."""
    cached = Path(HF_HUB_CACHE) / f"models--exported--{folder.name}"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    (cached / "snapshots" / COMMIT).symlink_to(folder.resolve(), target_is_directory=True)
    return load_transcoder_from_hub(f"exported/{folder.name}", device=CPU, dtype=torch.float32)[0]


def load_model(folder: Path, transcoders: Any) -> Any:
    """A replacement model of a Gemma-2 in a folder; its logits are checked against transformers'."""
    whole = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = make_config(whole.config, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ReplacementModel.from_config(config, transcoders, tokenizer=tokenizer)
    found = {}
    for name, weight in convert_gemma_weights(whole, config).items():  # these are wrapped in its own modules
        name = name.replace(".mlp.", ".mlp.old_mlp.")
        found[name.replace("unembed.", "unembed.old_unembed.")] = weight
    missing, unknown = model.load_state_dict(found, strict=False)
    lacks = [name for name in missing if name.rpartition(".")[2][:1] in "Ww" and not name.startswith("transcoders.")]
    assert not unknown and not lacks, (lacks, unknown)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        apart = float((model(ids) - whole(ids).logits).abs().max())
    assert apart < 1e-2, f"the replacement model's logits are {apart:.2g} from transformers'"
    return model


def contribute(transcoders: Any, layer: int, x: Tensor) -> Tensor:
    """[layers, ..., D]: what latents that read `layer` write to it and, in a cross-layer transcoder, to later ones."""
    acts = transcoders.encode_layer(x, layer)
    if not isinstance(transcoders, CrossLayerTranscoder):
        return transcoders[layer].decode(acts, x)[None]
    written = torch.einsum("...f,fld->l...d", acts, transcoders._get_decoder_vectors(layer))
    written[0] += transcoders.b_dec[layer]
    return written


@torch.no_grad()
def loss(model: Any, ids: Tensor, kind: str) -> float:
    """Cross-entropy with each MLP as it is, left out, or replaced; the first position keeps its own."""
    layers = model.cfg.n_layers
    waiting: list[Any] = [0.0] * layers

    def read(x: Tensor, hook: Any) -> None:
        written = contribute(model.transcoders, hook.layer(), x)
        for layer, part in enumerate(written, hook.layer()):
            waiting[layer] = waiting[layer] + part

    def write(y: Tensor, hook: Any) -> Tensor:
        instead = torch.zeros_like(y) if kind == "skipped" else waiting[hook.layer()]
        return torch.cat([y[:, :1], instead[:, 1:]], 1)

    hooks = []
    for layer in range(layers):
        if kind == "replaced":
            hooks.append((f"blocks.{layer}.{model.feature_input_hook}", read))
        if kind != "clean":
            hooks.append((f"blocks.{layer}.{model.original_feature_output_hook}", write))
    return float(model.run_with_hooks(ids, return_type="loss", fwd_hooks=hooks))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"model", "folder", "work": x.npy [L, N, D] and ids.npy, "prompt"}"""
    work = Path(request["work"])
    transcoders = load_transcoders(Path(request["folder"]))
    x = torch.from_numpy(np.load(work / "x.npy"))
    with torch.no_grad():
        np.save(work / "rebuilt.npy", transcoders.decode(transcoders.encode(x), x).numpy())
    model = load_model(Path(request["model"]), transcoders)
    ids = torch.from_numpy(np.load(work / "ids.npy").astype(np.int64))
    said: dict[str, Any] = {kind: loss(model, ids, kind) for kind in ("clean", "replaced", "skipped")}
    graph = attribute(request["prompt"], model, max_feature_nodes=request["nodes"], batch_size=64)
    edges = graph.adjacency_matrix
    assert bool(torch.isfinite(edges).all())
    replacement, completeness = (float(score) for score in compute_graph_scores(graph))
    said |= {"active": len(graph.active_features), "features": len(graph.selected_features)}
    return said | {"edges": int((edges != 0).sum()), "scores": (replacement, completeness)}


if __name__ == "__main__":
    serve(answer)
