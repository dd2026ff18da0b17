"""Make the golden outputs of the official SAEBench, in its own environment and offline.

    make saebench
    .venv-saebench/bin/python tests/golden/make_saebench.py

1. The inputs are a random Gemma-2 of four layers, rows of random tokens, and SAEs of four architectures as saved by
   SAELens; all lie in tests/golden/saebench/ next to the outputs.
2. The official functions run on them, with an activation store that returns the file's rows of tokens in order.
3. The official JSON is kept as written.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden" / "saebench"
sys.path.insert(0, str(ROOT / "bench" / "peers"))

LAYER, D, F, K = 1, 16, 40, 4
ROWS, CONTEXT, VOCAB = 24, 24, 60
PAD, EOS, BOS = 0, 1, 2
BATCH, RECONSTRUCTION, SPARSITY = 3, 2, 5
HOOK = f"blocks.{LAYER}.hook_resid_post"
METADATA = {"model_name": "tiny-gemma-2", "hook_name": HOOK, "context_size": CONTEXT, "prepend_bos": True}


def make_model(folder: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=6.0,
        initializer_range=0.4,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def make_tokens() -> torch.Tensor:
    """Rows that start with BOS; documents end with EOS here and there."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (ROWS, CONTEXT), generator=generator)
    tokens[torch.rand(ROWS, CONTEXT, generator=generator) < 0.05] = EOS
    tokens[:, 0] = BOS
    return tokens


@torch.no_grad()
def make_saes(folder: Path, resid: torch.Tensor) -> list[Path]:
    """SAEs with tied random directions about the mean of the residuals; one latent of each never fires."""
    from sae_lens import GatedSAEConfig, JumpReLUSAEConfig, StandardSAEConfig, TopKSAEConfig
    from sae_lens.saes.sae import SAE

    rows = resid.reshape(-1, D)
    kinds = {
        "standard": StandardSAEConfig,
        "topk": lambda **common: TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=False, **common),
        "jumprelu": JumpReLUSAEConfig,
        "gated": GatedSAEConfig,
    }
    folders = []
    for number, (name, make) in enumerate(kinds.items()):
        generator = torch.Generator().manual_seed(10 + number)
        config = make(d_in=D, d_sae=F, apply_b_dec_to_input=name != "jumprelu")
        for key, value in METADATA.items():
            setattr(config.metadata, key, value)
        sae = SAE.from_dict(config.to_dict())
        directions = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
        sae.W_dec.data = directions
        sae.W_enc.data = 0.5 * directions.T.contiguous() + 0.02 * torch.randn(D, F, generator=generator)
        sae.b_dec.data = rows.mean(dim=0)
        for bias in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if getattr(sae, bias, None) is not None:
                getattr(sae, bias).data = 0.1 * torch.randn(F, generator=generator)
        if hasattr(sae, "threshold"):
            sae.threshold.data = torch.full((F,), 0.5)
        dead = sae.b_gate if name == "gated" else sae.b_enc
        dead.data[7] = -1e4
        sae.save_model(folder / name)
        folders.append(folder / name)
    return folders


def run_core(model: object, sae_folder: Path, tokens: torch.Tensor) -> None:
    """The official core evaluation, as `multiple_evals` runs it for one SAE."""
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils import general_utils
    from sae_lens import SAE
    from saebench_core import FLAGS, TokenRows

    sae = SAE.load_from_disk(str(sae_folder), device="cpu")
    _, sae, _ = general_utils.load_and_format_sae("golden", sae, "cpu")
    config = CoreEvalConfig(
        model_name=METADATA["model_name"],
        llm_dtype="float32",
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=RECONSTRUCTION,
        n_eval_sparsity_variance_batches=SPARSITY,
        dataset="golden",
        context_size=CONTEXT,
        **FLAGS,
    )
    scalars, latents = core.run_evals(sae, TokenRows(tokens, BATCH), model, config, ignore_tokens={PAD, EOS, BOS})
    result = {
        "unique_id": f"golden_{sae_folder.name}",
        "sae_set": "golden",
        "sae_id": sae_folder.name,
        "eval_cfg": config,
        "metrics": {**scalars, "misc_metrics": core.calculate_misc_metrics(latents)},
        "feature_metrics": latents,
    }
    cleaned = core.replace_nans_with_negative_one(result)
    core.save_single_eval_result(
        cleaned, "golden", "6.54.12", "Unknown", str(FOLDER / f"core_{sae_folder.name}.json"), sae
    )


def record_versions() -> None:
    from importlib.metadata import version

    packages = ("sae-bench", "sae-lens", "transformer-lens", "torch", "transformers", "numpy")
    written = {package: version(package) for package in packages}
    (FOLDER / "versions.json").write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    from hooked_gemma import load_hooked

    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make_model(FOLDER / "model")
    model = load_hooked(FOLDER / "model")
    tokens = make_tokens()
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    save_file({"tokens": tokens, "resid": cache[HOOK].contiguous()}, FOLDER / "inputs.safetensors")
    for folder in make_saes(FOLDER / "saes", cache[HOOK]):
        run_core(model, folder, tokens)
    record_versions()


if __name__ == "__main__":
    main()
