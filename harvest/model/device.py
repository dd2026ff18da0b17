"""The device that a model runs on, by its name."""

from __future__ import annotations

import torch

from ..errors import SettingInvalid


def find_device(name: str) -> torch.device:
    """`auto` takes a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    index = name.removeprefix("cuda:")
    if index != name and index.isdigit() and int(index) >= torch.cuda.device_count() > 0:
        raise SettingInvalid(f"--device {name}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingInvalid(f"--device {name}: {reason}. Expected auto, cpu, cuda or cuda:1 and the like") from None
