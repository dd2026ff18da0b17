"""The model card of SAEs on the Hugging Face Hub: what they are, what they were trained on, how good they are, and how
to load them.

It contains names of models, corpora and folders, which anybody may have chosen: none appears in the header, and in the
text they are escaped so that none acts as Markdown.
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
from ..disk.sae_lens_folder import TENSORS, TRANSCODERS, read_config
from .init_from_trained_sae import source_of

LONGEST_NAME = 200  # characters
FORMAT = 1  # of results, which state it only if it is another
COMPARED = ("L0, ", "explained variance, ", "cross entropy score, ")  # the numbers in the table of several SAEs


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
    """Gather what cfg.json, the run's result.json and its core evaluation say about an SAE."""
    result, core = folder.parent / "result.json", f"evals/core/{folder.name}_eval_results.json"
    saes = _object(read_json(result), "saes") if result.is_file() else {}
    found = (read_json(home / core) for home in (folder.parent, folder) if (home / core).is_file())
    own = next((one for one in found if _is_result_of(folder, one)), {})
    return Described(place, read_config(folder), _object(saes, folder.name), own)


def _is_result_of(folder: Path, core: Mapping[str, Any]) -> bool:
    """Whether a result is in this format and was measured on exactly these weights."""
    ours = _object(core, "saemill")
    return ours.get("format", FORMAT) == FORMAT and ours.get("sha256") == source_of(folder).sha256


def write_card(repository: str, saes: Sequence[Described], licence: str | None, pictures: Sequence[str]) -> str:
    """README.md of a repository; `pictures` are paths in it."""
    shown = ["", "## Plots"] if pictures else []
    for path in pictures:
        title = Path(path).stem.replace("_", " ")
        shown += ["", f"### {title.capitalize()}", "", f"![{title}]({path})"]
    header = ["---", 'library_name: "saemill"', 'tags: ["sparse-autoencoder", "saemill"]']
    header += [] if licence is None else [f"license: {json.dumps(licence)}"]
    return "\n".join([*header, "---", f"# {repository}", "", *_body(repository, saes), *shown, ""])


def _body(repository: str, saes: Sequence[Described]) -> Iterator[str]:
    count = "A sparse autoencoder" if len(saes) == 1 else f"{len(saes)} sparse autoencoders"
    is_ours = all("cache_id" in sae.metadata for sae in saes)  # other tools have no store
    yield f"{count} of a language model's activations{', trained with saemill' * is_ours}."
    facts = [dict(_facts(sae)) for sae in saes]
    common: dict[str, Any] = {}
    if len(saes) > 1:
        for one in facts:
            one.pop("variant", None)  # the table that compares them has it
        common = {name: value for name, value in facts[0].items() if all(one.get(name) == value for one in facts)}
        yield from ("", *_comparison(saes))
        if common:
            yield from ("", *_table(("all of them", ""), [(name, plain(value)) for name, value in common.items()]))
    for sae, own in zip(saes, facts, strict=True):
        yield from ("", f"## {plain(sae.place or sae.metadata.get('training_architecture', 'The SAE'))}", "")
        if rows := [(name, plain(value)) for name, value in own.items() if name not in common]:
            yield from (*_table(("", ""), rows), "")
        if measured := list(_measurements(sae)):
            yield from _table(("measured", "value", "95 % interval"), measured)
    yield from ("", "## Load", "", *_load_instructions(repository, saes))


def _comparison(saes: Sequence[Described]) -> Iterator[str]:
    """A line per SAE, with the numbers of core if all have them, otherwise those of training."""
    numbers_of = _core_numbers if all(sae.core for sae in saes) else _training_numbers
    found = [{name: _number(value) for name, value, _ in numbers_of(sae) if _is_number(value)} for sae in saes]
    names = [name for name in dict.fromkeys(name for each in found for name in each) if name.startswith(COMPARED)]
    rows = [
        [plain(sae.place), plain(_variant(sae)), *(each.get(name, "") for name in names)]
        for sae, each in zip(saes, found, strict=True)
    ]
    yield from _table(("SAE", "variant", *names), rows)


def _variant(sae: Described) -> Any:
    return sae.metadata.get("training_architecture", sae.config.get("architecture"))


def _facts(sae: Described) -> Iterator[tuple[str, Any]]:
    """What the SAE is and what it was trained on."""
    config, metadata = sae.config, sae.metadata
    layers, rebuilt = metadata.get("layers"), metadata.get("target_layers")
    details = _object(metadata, "training_architecture_details")
    named = {
        "variant": _variant(sae),
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
        "core measured on": _object(sae.core, "saemill").get("measured_on"),
    }
    for name in ("k", "training tokens"):
        named[name] = _number(named[name]) if _is_number(named[name]) else named[name]
    yield from ((name, value) for name, value in named.items() if value not in (None, ""))


def _measurements(sae: Described) -> Iterator[tuple[str, str, str]]:
    """The run's held-out numbers, and those of the core evaluation with their intervals."""
    for name, value, edges in (*_training_numbers(sae), *_core_numbers(sae)):
        is_interval = isinstance(edges, list) and len(edges) == 2 and all(map(_is_number, edges))
        if _is_number(value):
            yield name, _number(value), " to ".join(map(_number, edges)) if is_interval else ""


def _training_numbers(sae: Described) -> Iterator[tuple[str, Any, Any]]:
    result = sae.result or sae.metadata
    if not result.keys() & {"validation_tokens", "cache_id"}:  # another tool's numbers, on unknown data
        return
    named = {"L0": "l0", "explained variance": "explained_variance"}
    if result.get("validation_massive"):
        named["explained variance with massive rows"] = "explained_variance_with_massive"
        named["massive rows"] = "validation_massive"
    named["ordinary rows"] = "validation_tokens"
    yield from ((f"{name}, validation split", result.get(key), None) for name, key in named.items())
    yield "dead latents", result.get("dead_latents"), None


def _core_numbers(sae: Described) -> Iterator[tuple[str, Any, Any]]:
    core = sae.core
    metrics, ours = _object(core, "eval_result_metrics"), _object(core, "saemill_metrics")
    edges, massive, kept = (_object(ours, name) for name in ("confidence_95", "massive", "massive_kept"))
    losses = {**_object(metrics, "model_performance_preservation"), **_object(metrics, "model_behavior_preservation")}
    own = f", {_split_name(sae)}"
    yield f"L0{own}", _object(metrics, "sparsity").get("l0"), edges.get("l0") if not massive.get("tokens") else None
    yield f"explained variance{own}", ours.get("explained_variance"), edges.get("explained_variance")
    if massive.get("tokens"):
        yield f"explained variance with massive rows{own}", ours.get("explained_variance_with_massive"), None
        yield f"massive rows{own}", massive["tokens"], None
    yield f"cross entropy without the SAE{own}", losses.get("ce_loss_without_sae"), None
    yield f"cross entropy with the SAE{own}", losses.get("ce_loss_with_sae"), edges.get("ce_loss_with_sae")
    yield f"cross entropy score{own}", losses.get("ce_loss_score"), edges.get("ce_loss_score")
    yield f"KL divergence score{own}", losses.get("kl_div_score"), edges.get("kl_div_score")
    if kept.get("tokens"):
        yield f"cross entropy score with massive rows left as they are{own}", kept.get("ce_loss_score"), None


def _split_name(sae: Described) -> str:
    settings = _object(_object(sae.core, "saemill"), "settings")
    split, own = _object(settings, "config").get("split", "test"), sae.metadata.get("cache_id")
    store = settings.get("cache_id") or own
    return f"{plain(split)} split" if own in (None, store) else f"{plain(split)} split of the store {plain(store)}"


def _load_instructions(repository: str, saes: Sequence[Described]) -> Iterator[str]:
    """How to load them in this package, and in SAELens where it has the architecture."""
    yield from ("```python", "from saemill.train import load_sae", "")
    yield f"{_load_each(saes, 'load_sae', json.dumps(repository))}  # raw activations in"
    yield "```"
    known = [sae for sae in saes if sae.config.get("architecture") in (*TENSORS, *TRANSCODERS)]
    others = [sae for sae in saes if sae not in known]
    if known:
        yield from ("", "In SAELens:", "", "```python")
        yield from ("from huggingface_hub import snapshot_download", "from sae_lens import SAE", "")
        yield f"folder = snapshot_download({json.dumps(repository)})"
        yield from (_load_each(known, "SAE.load_from_disk", "folder"), "```")
    if others:
        names = ", ".join(plain(sae.place) for sae in others if sae.place) or "this one"
        yield from ("", f"SAELens has no architecture for {names}.")


def _load_each(saes: Sequence[Described], load: str, home: str) -> str:
    """Code that loads one SAE, or several by name; `home` is an expression for their folder."""
    if len(saes) > 1:
        return f'saes = {{name: {load}({home} + "/" + name) for name in {json.dumps([sae.place for sae in saes])}}}'
    inside = f' + "/" + {json.dumps(saes[0].place)}' if saes[0].place else ""
    return f"sae = {load}({home}{inside})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def plain(value: Any) -> str:
    """Any text as one line of Markdown that shows it literally."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    cut = words if len(words) <= LONGEST_NAME else words[:LONGEST_NAME] + "…"
    return html.escape(re.sub(r"([!-%'-+.:;=?@\[-`{-~])", r"\\\1", cut), quote=False)


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
