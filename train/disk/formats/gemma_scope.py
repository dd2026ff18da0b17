"""Gemma Scope (Lieberum et al. 2024): `params.npz` of a JumpReLU SAE of Gemma 2; read only.

Its files name neither layer nor hook; its repositories and folders do:
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`. In other folders, a cfg.json next to the weights must.
According to section 3.1 of the paper, res is the residual stream after a layer, mlp what the MLP adds to it, after the
norm there, and att the concatenated outputs of the heads before the output projection. According to its appendix,
transcoders read the output of the norm before the MLP without its gain, which was folded into the MLP: this package has
no hook there.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from ....cache_schema.sites import HOOKS, RESID
from ...errors import SaeInvalid
from ..atomic_files import read_json
from ..hook_metadata import place_metadata
from ..plain_form import Metadata, PlainSae, make_plain

PARAMS, PLACE = "params.npz", "cfg.json"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
REPOSITORY = re.compile(r"(?:.*--)?gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
SITES = {"res": RESID, "mlp": "mlp_out", "att": "z"}
EXAMPLE = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    path = folder / PARAMS
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(np.asarray(file[name], np.float32)) for name in NAMES}
            factor = np.asarray(file["scaling_factor"]) if "scaling_factor" in file else np.ones(1)
    except KeyError as error:
        raise SaeInvalid(f"{path}: expected the arrays {', '.join(NAMES)}, found others: {error.args[0]}") from None
    except (OSError, TypeError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise SaeInvalid(f"{path} is damaged, or not an archive of plain arrays ({error}): download it again") from None
    if not (factor == 1).all():
        raise SaeInvalid(f"{path}: expected scaling_factor 1, found other values: multiply W_dec's rows by them")
    metadata = _metadata_by_file(folder / PLACE) if (folder / PLACE).is_file() else _metadata_by_names(folder)
    return make_plain("jumprelu", found, None, False), metadata


def _metadata_by_names(folder: Path) -> Metadata:
    """Metadata from the names of the repository and its folders, ignoring the folders above it."""
    *_, of_cache, snapshots, above, layer, _, _ = (*[""] * 6, *folder.resolve().parts)
    named = REPOSITORY.fullmatch(of_cache if snapshots == "snapshots" else above)
    number = re.fullmatch(r"layer_(\d+)", layer)
    if named is None or number is None:
        if named is not None and layer == "embedding":
            where = "reconstructs the embedding, before the first layer, where there is no hook: use one of a layer"
            raise SaeInvalid(f"{folder} {where}")
        raise SaeInvalid(
            f"{folder}: expected the folder names of its repository, such as {EXAMPLE} (-res, -mlp, -att), which say "
            "what it reconstructs: its files do not. Rename the folders, or write a "
            f'{PLACE} next to {PARAMS}: {{"metadata": {{"layers": [20], "hook": "resid"}}}}, with its layer, and its '
            f"hook from {', '.join(HOOKS)}"
        )
    size, training, site = named.groups()
    at = int(number[1])
    if site not in SITES:
        raise SaeInvalid(
            f"{folder}: Gemma Scope's transcoders read the MLP's norm before its gain, where there is no hook: "
            "mlp_in is after the gain. Divide row i of W_enc by the gain of input i (1 + the weight of "
            f"model.layers.{at}.pre_feedforward_layernorm), save {PARAMS} again, and write a {PLACE} next to it: "
            f'{{"metadata": {{"layers": [{at}], "hook": "mlp_in", "target_hook": "mlp_out"}}}}'
        )
    name = f"google/gemma-2-{size}{'-it' if training == 'it' else ''}"
    return {"model_name": name, **place_metadata(SITES[site], SITES[site], at)}


def _metadata_by_file(path: Path) -> Metadata:
    """Metadata from the cfg.json that the user wrote."""
    given: Any = read_json(path).get("metadata")
    given = given if isinstance(given, dict) else {}
    layers, hook = given.get("layers"), given.get("hook")
    to_hook = given.get("target_hook", hook)
    is_layer = isinstance(layers, list) and len(layers) == 1 and type(layers[0]) is int and layers[0] >= 0
    is_known = all(isinstance(one, str) and one in HOOKS for one in (hook, to_hook))
    if not is_layer or not is_known or given.get("target_layers", layers) != layers:
        raise SaeInvalid(
            f"{path}: expected metadata with a single layer in layers, and a hook (and target_hook, if it writes "
            f"another) from {', '.join(HOOKS)}, found {given!r:.200}"
        )
    return {**given, **place_metadata(hook, to_hook, layers[0])}
