"""The model card of SAEs on the Hub: what they are, what they were trained on, how good they are, how to load them.

Names in it come from models, corpora and folders that anybody may have named: none of them appears in the header, and
in the text they are escaped, so none acts as Markdown.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk.atomic_files import read_json
from ..disk.sae_folder import TENSORS, TRANSCODERS, read_config
from .init_from_trained_sae import source_of

LIBRARY, TAGS = "saemill", ("sparse-autoencoder", "saemill")
LONGEST = 200  # characters of a name
FORMAT = 1  # of results; they will state it once there is another


@dataclass(frozen=True)
class Described:
    """One SAE, with everything on disk about it."""

    place: str
    """Its folder in the repository; empty if it is the only one."""
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    """Its entry in the run's result.json; empty if there is none."""
    core: Mapping[str, Any]

    @property
    def metadata(self) -> Mapping[str, Any]:
        return _object(self.config, "metadata")


def describe(folder: Path, place: str) -> Described:
    """What cfg.json, the run's result.json and its core evaluation say about an SAE."""
    result, core = folder.parent / "result.json", f"evals/core/{folder.name}_eval_results.json"
    saes = _object(read_json(result), "saes") if result.is_file() else {}
    found = (read_json(home / core) for home in (folder.parent, folder) if (home / core).is_file())
    own = next((one for one in found if _is_of(folder, one)), {})
    return Described(place, read_config(folder), _object(saes, folder.name), own)


def _is_of(folder: Path, core: Mapping[str, Any]) -> bool:
    """Whether a result is for exactly these weights, and not in a later format."""
    ours = _object(core, "saemill")
    return ours.get("format", FORMAT) == FORMAT and ours.get("sha256") == source_of(folder).sha256


def write_card(repository: str, saes: Sequence[Described], licence: str | None, pictures: Sequence[str] = ()) -> str:
    """README.md of a repository; `pictures` are paths in it."""
    shown = [line for path in pictures for line in ("", f"![{Path(path).stem.replace('_', ' ')}]({path})")]
    return "\n".join([*_header(licence), f"# {repository}", "", *_body(repository, saes), *shown, ""])


def _header(licence: str | None) -> Iterator[str]:
    yield "---"
    yield f"library_name: {json.dumps(LIBRARY)}"
    yield f"tags: {json.dumps(TAGS)}"
    if licence is not None:
        yield f"license: {json.dumps(licence)}"
    yield "---"


def _body(repository: str, saes: Sequence[Described]) -> Iterator[str]:
    count = "A sparse autoencoder" if len(saes) == 1 else f"{len(saes)} sparse autoencoders"
    is_ours = all("cache_id" in sae.metadata for sae in saes)  # other tools have no store
    yield f"{count} of a language model's activations{', trained with saemill' * is_ours}."
    for sae in saes:
        yield from ("", f"## {plain(sae.place or sae.metadata.get('training_architecture', 'The SAE'))}", "")
        yield from _table(("", ""), [(name, plain(value)) for name, value in _facts(sae)])
        measured = list(_measures(sae))
        if measured:
            yield ""
            yield from _table(("measured", "value", "95 % interval"), measured)
    yield from ("", "## Load", "", *_loading(repository, saes))


def _facts(sae: Described) -> Iterator[tuple[str, Any]]:
    """What the SAE is, and what it was trained on."""
    config, metadata = sae.config, sae.metadata
    layers, rebuilt = metadata.get("layers"), metadata.get("target_layers")
    details = _object(metadata, "training_architecture_details")
    named = {
        "variant": metadata.get("training_architecture", config.get("architecture")),
        "base": details.get("base"),
        "architecture": config.get("architecture"),
        "layers": _listed(layers),
        "reads": metadata.get("hook_name"),
        "rebuilds layers": _listed(rebuilt) if rebuilt != layers else None,
        "writes to": metadata.get("hook_name_out"),
        "input width": config.get("d_in"),
        "width": config.get("d_sae"),
        "k": config.get("k", details.get("k")),
        "model": metadata.get("model_name"),
        "revision": metadata.get("model_revision"),
        "corpus": metadata.get("dataset_path"),
        "context": metadata.get("context_size"),
        "training tokens": metadata.get("training_tokens"),
        "store": metadata.get("cache_id"),
        "seed": details.get("seed"),
    }
    yield from ((name, value) for name, value in named.items() if value not in (None, ""))


def _measures(sae: Described) -> Iterator[tuple[str, str, str]]:
    """Held-out numbers of the run, and those of the core evaluation with intervals."""
    for name, value, edges in (*_of_training(sae), *_of_core(sae)):
        if _is_number(value):
            yield name, _number(value), " to ".join(map(_number, edges)) if _is_interval(edges) else ""


def _of_training(sae: Described) -> Iterator[tuple[str, Any, Any]]:
    result = sae.result or sae.metadata
    if not result.keys() & {"validation_tokens", "cache_id"}:  # another tool's numbers, on unknown data
        return
    massive = result.get("validation_massive")
    where = "validation split"
    yield f"L0, {where}", result.get("l0"), None
    yield f"explained variance, {where}", result.get("explained_variance"), None
    yield f"explained variance with massive rows, {where}", result.get("explained_variance_with_massive"), None
    yield f"massive rows, {where}", massive, None
    yield f"ordinary rows, {where}", result.get("validation_tokens"), None
    yield "dead latents", result.get("dead_latents"), None


def _of_core(sae: Described) -> Iterator[tuple[str, Any, Any]]:
    core = sae.core
    metrics, ours = _object(core, "eval_result_metrics"), _object(core, "saemill_metrics")
    edges, massive, kept = (_object(ours, name) for name in ("confidence_95", "massive", "massive_kept"))
    losses = {**_object(metrics, "model_performance_preservation"), **_object(metrics, "model_behavior_preservation")}
    own = f", {_of_split(sae)}"
    yield f"explained variance{own}", ours.get("explained_variance"), edges.get("explained_variance")
    yield f"explained variance with massive rows{own}", ours.get("explained_variance_with_massive"), None
    yield f"massive rows{own}", massive.get("tokens"), None
    yield f"L0{own}", _object(metrics, "sparsity").get("l0"), edges.get("l0") if not massive.get("tokens") else None
    yield f"cross entropy without the SAE{own}", losses.get("ce_loss_without_sae"), None
    yield f"cross entropy with the SAE{own}", losses.get("ce_loss_with_sae"), edges.get("ce_loss_with_sae")
    yield f"cross entropy score{own}", losses.get("ce_loss_score"), edges.get("ce_loss_score")
    yield f"KL divergence score{own}", losses.get("kl_div_score"), edges.get("kl_div_score")
    if kept.get("tokens"):
        yield f"cross entropy score, massive rows left as they are{own}", kept.get("ce_loss_score"), None


def _of_split(sae: Described) -> str:
    settings = _object(_object(sae.core, "saemill"), "settings")
    split, own = _object(settings, "config").get("split", "test"), sae.metadata.get("cache_id")
    store = settings.get("cache_id") or own
    return f"{plain(split)} split" if own in (None, store) else f"{plain(split)} split of the store {plain(store)}"


def _loading(repository: str, saes: Sequence[Described]) -> Iterator[str]:
    """How to load them in this package, and in SAELens where it has the architecture."""
    yield from ("```python", "from saemill.train import load_sae", "")
    for sae in saes:
        address = f"{repository}/{sae.place}" if sae.place else repository
        yield f"sae = load_sae({json.dumps(address)})  # raw activations in"
    yield "```"
    known = [sae for sae in saes if sae.config.get("architecture") in (*TENSORS, *TRANSCODERS)]
    others = [sae for sae in saes if sae not in known]
    if known:
        yield from ("", "In SAELens:", "", "```python")
        yield from ("from huggingface_hub import snapshot_download", "from sae_lens import SAE", "")
        yield f"folder = snapshot_download({json.dumps(repository)})"
        for sae in known:
            inside = f' + "/" + {json.dumps(sae.place)}' if sae.place else ""
            yield f"sae = SAE.load_from_disk(folder{inside})"
        yield "```"
    if others:
        names = ", ".join(plain(sae.place) for sae in others if sae.place) or "this one"
        yield from ("", f"SAELens has no architecture for {names}.")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def plain(value: Any) -> str:
    """Any text as one line of Markdown that shows it literally."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    cut = words if len(words) <= LONGEST else words[:LONGEST] + "…"
    return html.escape(re.sub(r"([!-%'-+.:;=?@\[-`{-~])", r"\\\1", cut), quote=False)


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(edges: Any) -> bool:
    return isinstance(edges, list) and len(edges) == 2 and all(map(_is_number, edges))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
