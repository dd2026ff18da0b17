"""Steps as a GPU takes them, on a machine without one."""

from __future__ import annotations

import pytest
import torch

from saemill.train.sae.kernels import hardware


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Interpreted row-wise kernels, and numbers that are read late."""
    monkeypatch.setattr(hardware, "SERVED", {"cuda", "cpu"})
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())


@pytest.fixture
def quick_selection(monkeypatch):
    """Choose latents by torch, because interpreted selection kernels take seconds per step."""
    select = pytest.importorskip("saemill.train.sae.kernels.triton.exact_top_k")
    monkeypatch.setattr(select, "top_latents", top_latents)
    monkeypatch.setattr(select, "top_of_batch", top_of_batch)


def top_latents(pre: torch.Tensor, k: int) -> torch.Tensor:
    return pre.topk(k).indices.int().sort(dim=1).values


def top_of_batch(pre: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = pre.flatten().topk(count).indices.sort().values
    ends = torch.arange(len(pre) + 1, device=pre.device) * pre.shape[1]
    return torch.searchsorted(flat, ends).int(), (flat % pre.shape[1]).int()
