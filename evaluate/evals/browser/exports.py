"""The same latents in formats of other tools: SAEDashboard's batches, and the folder that Neuronpedia imports.

`--set browser.exports=saedashboard,neuronpedia` writes them next to the pages:
exports/saedashboard/SAE/batch-0.json and exports/neuronpedia/MODEL/LAYER-RUN-SAE/.

Both hold what we have (examples with all activations of their window, density, histogram, promoted tokens, near
latents) and leave the rest empty (neurons, logit histograms).
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ....cache_schema.numbers_in_words import say_size
from ...errors import SettingInvalid
from .collect_firings import SAMPLE, TOP, lower_edges
from .latents import RANDOM, Shown, parts_of
from .related import Near

BATCH = 128  # latents in a file
BUCKETS = 4  # quarters of a sample, from the highest to the lowest
UNUSED = (
    *(f"neuron_alignment_{name}" for name in ("indices", "values", "l1")),
    *(f"correlated_{what}_{name}" for what in ("neurons", "features") for name in ("indices", "l1", "pearson")),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)


@dataclass(frozen=True, eq=False)
class Exported:
    shown: Shown
    tokens: np.ndarray  # [W, T]
    texts: Mapping[int, str]
    promotes: Mapping[str, tuple[np.ndarray, np.ndarray]]
    near: Near
    """Latents near each one, by direction."""
    model: str
    corpus: str
    run: str

    @property
    def layer(self) -> int:
        return self.shown.subject.target_layers[-1]

    @property
    def sae_set(self) -> str:
        return f"{self.run}-{self.shown.subject.label}"

    @property
    def source(self) -> str:
        """The SAE's id on Neuronpedia."""
        return f"{self.layer}-{self.sae_set}"


def require_known(exports: Sequence[str]) -> None:
    unknown = sorted(set(exports) - set(WRITERS))
    if unknown:
        raise SettingInvalid(f"browser.exports: expected some of {', '.join(WRITERS)}, found {unknown}")


def bytes_of(exports: Sequence[str], examples: int, context: int) -> int:
    """About how much all requested formats take on disk: mostly the examples' text, with every activation."""
    return examples * context * sum(TOKEN_BYTES[name] for name in exports)


def write_exports(folder: Path, exports: Sequence[str], exported: Exported) -> None:
    for number, rows in enumerate(parts_of(exported.shown.subject.width, BATCH)):
        features = list(features_of(exported, rows))
        for name in exports:
            WRITERS[name](folder / "exports" / name, exported, number, features)


def keep_exports(before: Path, folder: Path, run: str, labels: Sequence[str]) -> None:
    """Copy the exports of SAEs that are kept from the previous browser."""
    for path in exports_in(before):
        if any(path.name == label or path.name.endswith(f"-{run}-{label}") for label in labels):
            shutil.copytree(before / path, folder / path)


def exports_in(folder: Path) -> list[Path]:
    """The SAEs that a browser has exports of, as paths relative to it."""
    found = (*folder.glob("exports/saedashboard/*"), *folder.glob("exports/neuronpedia/*/*"))
    return sorted(path.relative_to(folder) for path in found)


def report_exports(folder: Path, before: Sequence[Path]) -> Iterator[str]:
    """Lines on what is exported now, and on what no longer is, because its latents may have changed."""
    now = exports_in(folder)
    if now:
        size = sum(file.stat().st_size for path in now for file in (folder / path).rglob("*.*"))
        yield f"browser: {say_size(size)} of exports in {folder / 'exports'}"
    if gone := [str(path) for path in before if path not in now]:
        forms = ",".join(dict.fromkeys(path.split("/")[1] for path in gone))
        yield f"browser: removed {', '.join(gone)}: --set browser.exports={forms} writes exports again"


def features_of(exported: Exported, rows: slice) -> Iterator[dict[str, Any]]:
    """Latents in the form of SAEDashboard 0.8."""
    shown = exported.shown
    edges, windows, context = lower_edges(), *exported.tokens.shape
    for latent in range(rows.start, rows.stop):
        bins = np.flatnonzero(shown.seen.histogram[latent])
        yield {
            "feature_index": latent,
            **{name: [] for name in UNUSED},
            **logits_of(exported, latent),
            "frac_nonzero": float(shown.density[latent]),
            "freq_hist_data_bar_values": [edges[number] for number in bins],
            "freq_hist_data_bar_heights": shown.seen.histogram[latent, bins].tolist(),
            "n_prompts_total": windows,
            "n_tokens_in_prompt": context,
            "dataset": exported.corpus,
            "activations": activations_of(exported, latent),
        }


def logits_of(exported: Exported, latent: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"pos_str": [], "pos_values": [], "neg_str": [], "neg_values": []}
    for name, short in (("promoted", "pos"), ("suppressed", "neg")):
        if name in exported.promotes:
            tokens, values = (table[latent].tolist() for table in exported.promotes[name])
            found |= {f"{short}_str": [exported.texts[token] for token in tokens], f"{short}_values": rounded(values)}
    return found


def activations_of(exported: Exported, latent: int) -> list[dict[str, Any]]:
    """Examples in their groups, each with all activations of its window."""
    kept, reasons = exported.shown.kept
    items, entries = np.arange(*exported.shown.items[latent : latent + 2]), exported.shown.entries
    found = []
    for chosen, lower, share in groups(items, kept.peak, reasons):
        for item in chosen:
            span = slice(entries[item], entries[item + 1])
            values = np.zeros(exported.tokens.shape[1], np.float32)
            values[kept.position[span]] = kept.value[span]
            found.append(
                {
                    "bin_min": lower,
                    "bin_max": float(kept.peak[chosen].max()),
                    "bin_contains": share,
                    "qualifying_token_index": int(kept.at[item]),
                    "tokens": [exported.texts[token] for token in exported.tokens[kept.window[item]].tolist()],
                    "values": rounded(values.tolist()),
                }
            )
    return found


def groups(items: np.ndarray, peak: np.ndarray, reasons: np.ndarray) -> Iterator[tuple[np.ndarray, float, float]]:
    """The strongest, then quarters of the sample: examples, their lowest peak, their share of all activations."""
    top = items[reasons[items] & TOP > 0]
    if len(top):
        yield top, -1.0, -1.0  # not an interval
    sample = items[reasons[items] & (SAMPLE | RANDOM) == SAMPLE]
    for chosen in np.array_split(sample, BUCKETS):
        if len(chosen):
            yield chosen, float(peak[chosen].min()), 1 / BUCKETS


def write_saedashboard(folder: Path, exported: Exported, number: int, features: list[dict[str, Any]]) -> None:
    """A batch as SAEDashboard's runner for Neuronpedia writes it."""
    path = folder / exported.shown.subject.label / f"batch-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = {"model_id": exported.model, "layer": exported.layer, "sae_set": exported.sae_set, "features": features}
    path.write_text(json.dumps(batch, allow_nan=False), encoding="utf-8")


def write_neuronpedia(folder: Path, exported: Exported, number: int, features: list[dict[str, Any]]) -> None:
    """The folder of one SAE: facts about it, its features, their activations."""
    path = folder / exported.model.replace("/", "--") / exported.source
    path.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat()
    if number == 0:
        for name, row in facts_of(exported, now).items():
            write_lines(path / f"{name}.jsonl", [row])
    own = {"modelId": exported.model, "layer": exported.source, "creatorId": "", "createdAt": now}
    rows, activations = [], []
    for feature in features:
        latent, examples = feature["feature_index"], feature["activations"]
        columns = {name: value for name, value in feature.items() if name in FEATURE_COLUMNS}
        near = exported.near.latents[latent] >= 0
        rows.append(
            {
                **own,
                **columns,
                "index": str(latent),
                "maxActApprox": float(exported.shown.seen.highest[latent]),
                "hasVector": False,
                "vector": [],
                "topkCosSimIndices": exported.near.latents[latent][near].tolist(),
                "topkCosSimValues": rounded(exported.near.scores[latent][near].tolist()),
                "sourceSetName": exported.sae_set,
            }
        )
        for place, example in enumerate(examples):
            values = example["values"]
            highest = max(values)
            activations.append(
                {
                    **own,
                    "id": f"c{int(time.time()):08x}{zlib.crc32(exported.source.encode()):08x}{latent:08x}{place:04x}",
                    "index": str(latent),
                    "tokens": example["tokens"],
                    "values": values,
                    "maxValue": highest,
                    "maxValueTokenIndex": values.index(highest),
                    "minValue": min(values),
                    "binMin": example["bin_min"],
                    "binMax": example["bin_max"],
                    "binContains": example["bin_contains"],
                    "qualifyingTokenIndex": example["qualifying_token_index"],
                }
            )
    write_lines(path / "features" / f"batch-{number}.jsonl.gz", rows)
    write_lines(path / "activations" / f"batch-{number}.jsonl.gz", activations)


FEATURE_COLUMNS = {
    *UNUSED, "pos_str", "pos_values", "neg_str", "neg_values", "frac_nonzero", "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
}  # fmt: skip


def facts_of(exported: Exported, now: str) -> dict[str, dict[str, Any]]:
    """Release, model, set and source. The publisher fills in the creator."""
    windows, context = exported.tokens.shape
    whose = {"creatorId": "", "creatorName": "", "createdAt": now}
    return {
        "release": {"name": exported.run, "description": exported.run, "visibility": "PRIVATE", "urls": [], **whose},
        "model": {"id": exported.model, "displayName": exported.model, "instruct": False, "creatorId": "",
                  "createdAt": now, "updatedAt": now, "visibility": "PRIVATE"},
        "sourceset": {"modelId": exported.model, "name": exported.sae_set, "releaseName": exported.run,
                      "description": exported.shown.subject.name, "hasDashboards": True,
                      "visibility": "PRIVATE", **whose},
        "source": {"id": exported.source, "modelId": exported.model, "setName": exported.sae_set, "creatorId": "",
                   "createdAt": now, "hasDashboards": True, "visibility": "PRIVATE", "dataset": exported.corpus,
                   "num_prompts": windows, "num_tokens_in_prompt": context},
    }  # fmt: skip


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, 5, mtime=0) if path.suffix == ".gz" else text)


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


WRITERS = {"saedashboard": write_saedashboard, "neuronpedia": write_neuronpedia}
TOKEN_BYTES = {"saedashboard": 14, "neuronpedia": 2}  # per token of an example, about; the second is compressed
