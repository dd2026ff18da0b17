"""One process that makes training steps when told to, and says how long they took.

The other side writes lines to its standard input: a number of steps, or nothing to end it. For each
line it answers with one line of JSON: the seconds of every step. Imports only numpy and torch, so
the same loop drives this package and its peers, each in its own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def load_batches(folder: str, device: str) -> list[torch.Tensor]:
    """The activations that every contestant trains on."""
    return [torch.from_numpy(np.load(path)).to(device) for path in sorted(Path(folder).glob("batch_*.npy"))]


def sparse_bias(pre: torch.Tensor, l0: float) -> float:
    """The value that l0 pre-activations of a row exceed on average."""
    flat = pre.detach().reshape(-1)
    rank = flat.numel() - int(l0 * pre.shape[0])
    return float(flat.kthvalue(rank).values)


def serve(step: Callable[[torch.Tensor], object], batches: list[torch.Tensor], clock: str) -> None:
    """Answer requests for steps until the input ends."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    done = 0
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = now()
            step(batches[done % len(batches)])
            if batches[0].is_cuda:
                torch.cuda.synchronize()
            seconds.append(now() - start)
            done += 1
        print(json.dumps(seconds), flush=True)
