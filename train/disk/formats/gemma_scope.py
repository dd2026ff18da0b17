"""Gemma Scope: `params.npz` of a JumpReLU SAE or transcoder, below a folder named after its layer; read only."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from ...errors import SaeInvalid
from ..plain_form import PlainSae
from .plain import Metadata, make_plain

PARAMS = "params.npz"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    path = folder / PARAMS
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(np.asarray(file[name], np.float32)) for name in NAMES}
    except KeyError as error:
        raise SaeInvalid(f"{path}: expected the arrays {', '.join(NAMES)}, found otherwise: {error.args[0]}") from None
    except (OSError, TypeError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise SaeInvalid(f"{path} is damaged, or no archive of plain arrays ({error}): download it again") from None
    found["threshold"].clamp_min_(0)  # its codes are rectified as well
    place = str(folder.resolve())  # its files say neither the layer nor what they rebuild
    layers = [int(number) for number in re.findall(r"layer_(\d+)", place)[-1:]]
    metadata: Metadata = {"layers": layers} if layers else {}
    return make_plain("jumprelu", found, None, False), metadata | ({"transcodes": True} if "transcod" in place else {})
