"""What a device computes with, as far as it shows in the last digits: kept with each shard that it made."""

from __future__ import annotations

import torch

from ...cache_schema.commits import DeviceRecord


def describe_device(device: torch.device) -> DeviceRecord:
    """As torch is set now."""
    precise = torch.get_float32_matmul_precision() == "highest"
    if device.type == "cuda":
        settings = torch.backends.cuda.matmul
        reduced = settings.allow_bf16_reduced_precision_reduction or settings.allow_fp16_reduced_precision_reduction
        name = torch.cuda.get_device_name(device)
    else:
        reduced = False
        name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return DeviceRecord(device.type, name, torch.__version__, "ieee" if precise else "tf32", bool(reduced))


def find_others(recorded: dict[int, DeviceRecord], here: DeviceRecord) -> str:
    """What to say of shards that came from elsewhere; empty where all came from such a device as this."""
    others = {shard: device for shard, device in recorded.items() if device != here}
    if not others:
        return ""
    shard = min(others)
    more = " and others" if len(others) > 1 else ""  # how many is not known: a sample was asked for
    return (
        f"warning: shard {shard}{more} was computed on {others[shard]}; here it is {here}. What is computed here "
        "differs from it in the last digits, and the store's digest with it: for the same bits go on where it was begun"
    )
