"""How long a run would take: a few steps of it on a small part of the store, and nothing written."""

from __future__ import annotations

import statistics
import time

import torch

from ...cache_schema import Store
from ..data.feed import Feed
from ..data.read_order import Plan
from .open import make_fleet
from .settle import Settled
from .site import Site

WARM, MOST = 2, 30  # steps
SECONDS = 3.0
POOL_BATCHES = 16


def estimate_seconds(settled: Settled, store: Store, site: Site) -> float:
    """Of all steps of a run on this machine. What the run would be refused for, this is refused for too."""
    fleet, data = make_fleet(settled, store, site), settled.config.data
    pool_tokens = min(data.pool_tokens or data.batch_tokens, POOL_BATCHES * data.batch_tokens)
    plan = Plan(settled.plan.sizes, batch_tokens=data.batch_tokens, pool_tokens=pool_tokens, seed=data.seed)
    steps = min(settled.total_steps, MOST)
    feed = Feed(store, plan, fleet.needs.values(), fleet.stats, site.device, steps=steps)
    took, began = [], time.perf_counter()
    try:
        for step in range(steps):
            before = time.perf_counter()
            fleet.step(feed.draw(step))
            if site.device.type == "cuda":
                torch.cuda.synchronize(site.device)
            took.append(time.perf_counter() - before)
            if step >= WARM and took[-1] + time.perf_counter() - began > SECONDS:
                break
    finally:
        feed.close()
    return statistics.median(took[WARM:] or took) * settled.total_steps
