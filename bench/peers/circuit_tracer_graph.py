"""Exported transcoders in circuit-tracer: their reconstructions, an attribution graph, the model with MLPs replaced.

circuit-tracer asks the Hub even for transcoders in a folder, so the folder is put into a Hub cache and read offline by
`load_transcoder_from_hub`. Its `from_pretrained` accepts only models on TransformerLens' list of names, so the model is
made by `ReplacementModel.from_config`, as in its own tests, with the weights of the model's folder.

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
    """Load with circuit-tracer's own code, from a repository that exists only in the Hub's cache."""
    cached = Path(HF_HUB_CACHE) / f"models--exported--{folder.name}"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    (cached / "snapshots" / COMMIT).symlink_to(folder.resolve(), target_is_directory=True)
    return load_transcoder_from_hub(f"exported/{folder.name}", device=CPU, dtype=torch.float32)[0]


def load_model(folder: Path, transcoders: Any) -> Any:
    """A replacement model for the Gemma-2 in a folder; its logits are checked against transformers'."""
    whole = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = make_config(whole.config, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ReplacementModel.from_config(config, transcoders, tokenizer=tokenizer)
    state = {}
    for name, weight in convert_gemma_weights(whole, config).items():
        name = name.replace(".mlp.", ".mlp.old_mlp.")  # circuit-tracer wraps these two in its own modules
        state[name.replace("unembed.", "unembed.old_unembed.")] = weight
    missing, unknown = model.load_state_dict(state, strict=False)
    lost = [name for name in missing if name.rpartition(".")[2][:1] in "Ww" and not name.startswith("transcoders.")]
    assert not unknown and not lost, (lost, unknown)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        apart = float((model(ids) - whole(ids).logits).abs().max())
    assert apart < 1e-2, f"the replacement model's logits are {apart:.2g} from transformers'"
    return model


def contribute(transcoders: Any, layer: int, x: Tensor) -> Tensor:
    """[layers, ..., D]: the outputs of the latents that read `layer`, to it and (if cross-layer) to later layers."""
    acts = transcoders.encode_layer(x, layer)
    if not isinstance(transcoders, CrossLayerTranscoder):
        return transcoders[layer].decode(acts, x)[None]
    written = torch.einsum("...f,fld->l...d", acts, transcoders._get_decoder_vectors(layer))
    written[0] += transcoders.b_dec[layer]
    return written


@torch.no_grad()
def loss(model: Any, ids: Tensor, kind: str) -> float:
    """Cross-entropy with each MLP as it is, left out, or replaced; the first position keeps the MLP's output."""
    layers = model.cfg.n_layers
    outputs: list[Any] = [0.0] * layers

    def read(x: Tensor, hook: Any) -> None:
        written = contribute(model.transcoders, hook.layer(), x)
        for layer, part in enumerate(written, hook.layer()):
            outputs[layer] = outputs[layer] + part

    def write(y: Tensor, hook: Any) -> Tensor:
        replacement = torch.zeros_like(y) if kind == "skipped" else outputs[hook.layer()]
        return torch.cat([y[:, :1], replacement[:, 1:]], 1)

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
    found: dict[str, Any] = {kind: loss(model, ids, kind) for kind in ("clean", "replaced", "skipped")}
    graph = attribute(request["prompt"], model, max_feature_nodes=request["nodes"], batch_size=64)
    edges = graph.adjacency_matrix
    assert bool(torch.isfinite(edges).all())
    replacement, completeness = (float(score) for score in compute_graph_scores(graph))
    found |= {"active": len(graph.active_features), "features": len(graph.selected_features)}
    return found | {"edges": int((edges != 0).sum()), "scores": (replacement, completeness)}


if __name__ == "__main__":
    serve(answer)
