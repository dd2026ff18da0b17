"""Write saebench_probes/official.json: the official packages' results for synthetic activations and texts.

Run once, in its own environment (its versions are in the file):

    pip install sae-bench==0.6.0        # brings sae-probes 0.4.2
    JAXTYPING_DISABLE=1 python tests/golden/make_saebench_probes.py

`inputs()` and the functions it calls need only numpy: the test builds the same activations with them.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TARGET = Path(__file__).parent / "saebench_probes" / "official.json"
D, F, POSITIONS = 16, 48, 10
TRAIN, TEST = 60, 40  # texts of a class
SEED = 42
K_VALUES = [1, 2, 5, 10, 20]
N_VALUES = [2, 5, 10, 20]
PROBING = ("LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5_sentiment")
CLASSES = {PROBING[0]: ("0", "1", "2", "6", "9"), PROBING[1]: ("1.0", "5.0")}
GROUPS = (
    "male / female",
    "female_data_only",
    "professor / nurse",
    "nurse_data_only",
    "male_professor / female_nurse",
    "female_nurse_data_only",
)


def inputs() -> dict:
    """An SAE's weights and activations [texts, positions, D] of every class, train and test."""
    rng = np.random.RandomState(7)
    W_dec = unit(rng.randn(F, D))
    sae = {
        "W_enc": np.ascontiguousarray((W_dec + 0.3 * unit(rng.randn(F, D))).T),
        "W_dec": W_dec,
        "b_enc": np.where(rng.rand(F) < 0.2, 0.15, -0.4),  # some fire on a vector of zeros
        "b_dec": 0.1 * rng.randn(D),
    }
    probing = {name: parts(rng, signals(rng, classes)) for name, classes in CLASSES.items()}
    return {"sae": as32(sae), "probing": probing, "scr": parts(rng, confounded(rng))}


def signals(rng: np.random.RandomState, classes: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    """One direction per class, weak enough that probes make errors."""
    return {name: [0.55 * unit(rng.randn(D))] for name in classes}


def confounded(rng: np.random.RandomState) -> dict[str, list[np.ndarray]]:
    """Two directions, which span four quadrants; a group mixes the texts of its quadrants equally."""
    one, two = 0.5 * unit(rng.randn(D)), 0.7 * unit(rng.randn(D))
    quadrant = {"pp": one + two, "pn": -one + two, "np": one - two, "nn": -one - two}
    members = (("pp", "pn"), ("np", "nn"), ("pp", "np"), ("pn", "nn"), ("pp",), ("nn",))
    return {group: [quadrant[name] for name in names] for group, names in zip(GROUPS, members, strict=True)}


def parts(rng: np.random.RandomState, means: dict[str, list[np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    return {
        part: {name: texts(rng, centres, count) for name, centres in means.items()}
        for part, count in (("train", TRAIN), ("test", TEST))
    }


def texts(rng: np.random.RandomState, centres: list[np.ndarray], count: int) -> np.ndarray:
    """Activations with zeros at BOS and padding, and some tokens that sum to zero."""
    centre = np.stack([centres[i % len(centres)] for i in range(count)])
    acts = centre[:, None] + 1.2 * rng.randn(count, POSITIONS, D)
    lengths = rng.randint(3, POSITIONS + 1, size=count)
    acts[np.arange(POSITIONS)[None] >= lengths[:, None]] = 0
    acts[:, 0] = 0
    acts[::7, 1] = np.where(np.arange(D) % 2, 0.5, -0.5)
    return acts.astype(np.float32)


def table() -> dict[str, list]:
    """Rows of text with two labels."""
    rng = np.random.RandomState(3)
    rows = 900
    return {
        "text": [f"text {i}" for i in range(rows)],
        "one": rng.choice([0, 1, 2, 13, 21], size=rows).tolist(),
        "two": rng.randint(0, 2, size=rows).tolist(),
    }


def speeches(pair: str) -> list[dict]:
    languages = pair.split("-")
    return [{"translation": {name: f"{pair} {name} {i}" for name in languages}} for i in range(50)]


def files() -> list[dict]:
    rng = np.random.RandomState(5)
    kinds = ["C", "Python", "HTML", "Java", "PHP", "Go"]
    return [{"language": kinds[rng.randint(6)], "code": f"{i:06d}" * int(rng.randint(20, 120))} for i in range(2000)]


def binary() -> dict[str, np.ndarray]:
    """Labels and latents of a binary data set."""
    rng = np.random.RandomState(11)
    labels = rng.permutation(np.repeat([0, 1], 210))
    latents = np.maximum(rng.randn(420, F) - 0.8, 0) * np.exp(rng.randn(F))
    latents[:, :6] *= 1 + 0.6 * labels[:, None]
    return {"labels": labels, "latents": latents.astype(np.float32)}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def as32(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def main() -> None:
    made = inputs()
    found = {
        "versions": {name: version(name) for name in ("sae-bench", "sae-probes", "torch", "scikit-learn", "numpy")},
        "pooled": pooled(made),
        "sparse_probing": sparse_probing(made),
        "tpp": perturbed(made, perform_scr=False),
        "scr": perturbed(made, perform_scr=True),
        "samples": samples(),
        "sae_probes": sae_probes(),
        "keys": keys(),
    }
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


def official_sae(weights: dict[str, np.ndarray]):
    import torch

    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    return SimpleNamespace(
        W_dec=SimpleNamespace(data=w["W_dec"], shape=w["W_dec"].shape),
        dtype=torch.float32,
        device=torch.device("cpu"),
        cfg=SimpleNamespace(hook_layer=0, hook_name="blocks.0.hook_resid_post"),
        encode=lambda x: torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]),
        decode=lambda f: f @ w["W_dec"] + w["b_dec"],
    )


def tensors(classes: dict[str, np.ndarray]) -> dict:
    import torch

    return {name: torch.from_numpy(array.copy()) for name, array in classes.items()}


def pooled(made: dict) -> dict:
    from sae_bench.sae_bench_utils import activation_collection as official

    acts = tensors(made["probing"][PROBING[0]]["train"])
    model = official.create_meaned_model_activations(acts)
    latents = official.get_sae_meaned_activations(acts, official_sae(made["sae"]), 25)
    return {
        "model": {name: x.double().mean(0).tolist() for name, x in model.items()},
        "latents": {name: x.double().mean(0).tolist() for name, x in latents.items()},
    }


def sparse_probing(made: dict) -> dict:
    from sae_bench.evals.sparse_probing import main as official
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    def activations(name: str, *_):
        return tuple(tensors(made["probing"][name][part]) for part in ("train", "test"))

    official.get_dataset_activations = activations
    config = SparseProbingEvalConfig(
        dataset_names=list(PROBING), k_values=K_VALUES, model_name="", llm_dtype="float32", llm_batch_size=8
    )
    with tempfile.TemporaryDirectory() as folder:
        results, by_class = official.run_eval_single_sae(
            config, official_sae(made["sae"]), None, "cpu", folder, save_activations=False
        )
    return {"results": results, "by_class": by_class}


def perturbed(made: dict, perform_scr: bool) -> dict:
    from sae_bench.evals.scr_and_tpp import main as official
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

    acts = made["scr"] if perform_scr else made["probing"][PROBING[0]]
    official.get_dataset_activations = lambda *_: tuple(tensors(acts[part]) for part in ("train", "test"))
    config = ScrAndTppEvalConfig(
        dataset_names=[PROBING[0]],
        perform_scr=perform_scr,
        n_values=N_VALUES,
        sae_batch_size=25,
        llm_batch_size=8,
        llm_dtype="float32",
        column1_vals_lookup={PROBING[0]: [("professor", "nurse")]},
    )
    with tempfile.TemporaryDirectory() as folder:
        results, by_class = official.run_eval_single_sae(
            config, official_sae(made["sae"]), None, "cpu", folder, save_activations=False
        )
    return {"results": results, "by_class": by_class}


def samples() -> dict:
    import pandas as pd
    from sae_bench.evals.scr_and_tpp import dataset_creation
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    frame = pd.DataFrame(table())
    dataset_info.dataset_metadata["made"] = {
        "text_column_name": "text",
        "column1_name": "one",
        "column2_name": "two",
        "column1_mapping": {"P": 21, "N": 13},
        "column2_mapping": {"male": 0, "female": 1},
    }
    columns = ("P", "N"), ("male", "female")
    dataset_utils.load_dataset = lambda name, *rest, **_: files() if "github" in name else speeches(rest[0])
    languages = list(dataset_info.chosen_classes_per_dataset["codeparrot/github-code"])
    return {
        "balanced": dataset_utils.get_balanced_dataset(frame, "made", 30, SEED),
        "by_class": dataset_utils.gather_dataset_from_df(frame, [0, 2], 25, "one", "text", SEED),
        "spurious": dataset_creation.get_spurious_corr_data(frame, *columns, "made", 20, SEED),
        "files": [
            {name: [[file[:6], len(file)] for file in part[name]] for name in part}
            for part in dataset_utils.get_github_code_dataset("github", languages, 60, 20, SEED)
        ],
        "speeches": dataset_utils.get_europarl_dataset("europarl", ["en", "fr", "de", "es", "nl"], 40, 20, SEED),
    }


def sae_probes() -> dict:
    import torch
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_data import get_train_test_indices
    from sae_probes.utils_training import find_best_reg

    made = binary()
    labels, latents = made["labels"], torch.from_numpy(made["latents"])
    size = len(labels)
    num_train = min(size - 100, 1024)
    train, test = get_train_test_indices(labels, num_train, size - num_train - 1, 0.5, SEED)
    y_train, y_test = torch.tensor(labels[train]), torch.tensor(labels[test])
    ranked = get_sorted_indices(latents[train], y_train, mean_act_normalization)

    def fitted(rows: torch.Tensor, penalty: str, fewer: int | None = None) -> dict[str, float]:
        part = slice(0, fewer)
        return vars(
            find_best_reg(
                rows[train][part],
                y_train[part],
                rows[test],
                y_test,
                n_jobs=-1,
                parallel=False,
                penalty=penalty,
                seed=SEED,
            ).metrics
        )

    return {
        "train": train.tolist(),
        "test": test.tolist(),
        "ranked": ranked.tolist(),
        "l1": {str(k): fitted(latents[:, ranked[:k]], "l1") for k in (1, 2, 5)},
        "l2": fitted(latents, "l2"),
        "l2_few_rows": fitted(latents, "l2", fewer=90),
    }


def keys() -> dict[str, dict]:
    """The names in each evaluation's JSON: settings, metrics by category, details."""
    from dataclasses import fields

    from sae_bench.evals.scr_and_tpp import eval_output as perturbation
    from sae_bench.evals.sparse_probing import eval_output as probing
    from sae_bench.evals.sparse_probing_sae_probes import eval_output as probes

    def names(record: type) -> list[str]:
        return [field.name for field in fields(record)]

    kinds = {
        "sparse_probing": (
            probing.SparseProbingEvalConfig,
            {"llm": probing.SparseProbingLlmMetrics, "sae": probing.SparseProbingSaeMetrics},
            probing.SparseProbingResultDetail,
        ),
        "scr": (
            perturbation.ScrAndTppEvalConfig,
            {"scr_metrics": perturbation.ScrMetrics},
            perturbation.ScrResultDetail,
        ),
        "tpp": (
            perturbation.ScrAndTppEvalConfig,
            {"tpp_metrics": perturbation.TppMetrics},
            perturbation.TppResultDetail,
        ),
        "sparse_probing_sae_probes": (
            probes.SparseProbingSaeProbesEvalConfig,
            {"llm": probes.SaeProbesLlmMetrics, "sae": probes.SaeProbesSaeMetrics},
            probes.SaeProbesResultDetail,
        ),
    }
    return {
        name: {
            "eval_config": names(config),
            "eval_result_metrics": {category: names(record) for category, record in metrics.items()},
            "eval_result_details": names(detail),
        }
        for name, (config, metrics, detail) in kinds.items()
    }


if __name__ == "__main__":
    main()
