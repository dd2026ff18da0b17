"""A process that takes training steps on request and reports their time.

`{"open": settings}` builds a trainer; `{"steps": 10, "warm": 3}` takes steps and answers with seconds per step and the
peak device memory; `{"close": true}` frees the trainer. A turn is timed as a whole: waiting for every single step
would hide the overlap of queued steps. Imports only numpy and torch, so that the same loop drives this package and
its peers, each in its own environment.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker_pipe import serve

Step = Callable[[torch.Tensor], object]
PRECISIONS = ("float32", "tf32", "bfloat16")
LONG = 10**9  # steps or tokens since a latent that is made dead last fired


@dataclass(frozen=True)
class Settings:
    """The settings of one trainer."""

    batches: str  # folder
    variant: str
    width: int
    k: int
    layers: int = 0  # of a transcoder, whose batches have inputs and targets side by side; 0: an SAE
    l0: float = 0.0  # how many latents fire at the start, in variants without k; 0: as initialised
    dead: float = 0.0  # the share of latents that never fire
    device: str = "cpu"
    clock: str = "wall"
    precision: str = "float32"
    fused: bool = False  # Adam in one kernel, if a peer leaves it at its default
    compiled: bool = False  # the peer's own switch for torch.compile

    @property
    def num_dead(self) -> int:
        return round(self.dead * self.width)

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast that a peer's own mixed-precision switch turns on."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()


def sparse_bias(pre: torch.Tensor, l0: float) -> float:
    """The value that l0 of a row's pre-activations exceed on average."""
    flat = pre.detach().reshape(-1)
    rank = flat.numel() - int(l0 * pre.shape[0])
    return float(flat.kthvalue(rank).values)


def split_pairs(batches: list[torch.Tensor]) -> dict[int, tuple[torch.Tensor, ...]]:
    """Inputs and targets by the id of their batch."""
    return {id(x): tuple(part.contiguous() for part in x.chunk(2, dim=1)) for x in batches}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fuse(optimizer: Any) -> None:
    """Switch to torch's fused Adam, before the first step."""
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}


class Stepper:
    """Answers the requests above."""

    def __init__(self, make: Callable[[Settings, list[torch.Tensor]], Step]) -> None:
        self._make = make
        self._step: Step | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        if "open" in request:
            return self._open(Settings(**request["open"]))
        if "close" in request:
            return self._close()
        return self._run(request["steps"], request.get("warm", 0), request.get("release", False))

    def _open(self, settings: Settings) -> None:
        self._close()
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        torch.manual_seed(0)
        files = sorted(Path(settings.batches).glob("batch_*.npy"))
        batches = [torch.from_numpy(np.load(path)).to(settings.device) for path in files]
        self._device = batches[0].device
        self._now = time.process_time if settings.clock == "cpu" else time.perf_counter
        self._step = self._make(settings, batches)
        self._batches = cycle(batches)

    def _run(self, steps: int, warm: int, release: bool) -> dict[str, float]:
        assert self._step is not None
        on_gpu = self._device.type == "cuda"
        if on_gpu:  # before the third step, from which on steps are replayed and allocate nothing
            torch.cuda.reset_peak_memory_stats()
        for _ in range(warm):
            self._step(next(self._batches))
        wait_for(self._device)
        start = self._now()
        for _ in range(steps):
            self._step(next(self._batches))
        wait_for(self._device)
        seconds = (self._now() - start) / steps
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        if release and on_gpu:
            torch.cuda.empty_cache()
        return {"seconds": seconds, "peak": peak}

    def _close(self) -> None:
        """Free everything that the previous trainer holds, also on the device."""
        self._step, self._batches = None, iter(())
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def serve_steps(make: Callable[[Settings, list[torch.Tensor]], Step]) -> None:
    serve(Stepper(make).answer)
