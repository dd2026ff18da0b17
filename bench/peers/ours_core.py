"""Our core evaluation of the same SAEs on the same rows: answers requests with seconds and memory growth.

Loading is not timed; memory growth is since before the model was loaded, and reported next to the model's own size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from timing_and_tables import resident
from worker_pipe import serve

from saemill.cache_schema import Store
from saemill.cache_schema.keep_freed_memory import keep_large_blocks
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.write_and_read_results import frame
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.run.find_saes_to_evaluate import find_subjects
from saemill.harvest.progress import Watch


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    keep_large_blocks()
    before = resident()
    store = Store.open(request["store"])
    context = Context(store, model_name=request["model"], watch=Watch(is_quiet=True))
    weights = sum(parameter.nbytes for parameter in context.model.model.parameters())
    subjects = find_subjects(request["saes"], Path())
    counts = request["reconstruction"], request["sparsity"]
    config = core.Config(request["batch"], *counts, ablations=tuple(request["ablations"]))
    loaded = resident()
    Path("/proc/self/clear_refs").write_text("5")
    start = perf_counter()
    for result in core.evaluate(context, subjects, config):
        frame(result, "core", {})
    seconds = perf_counter() - start
    peak = resident("VmHWM")
    return {"seconds": seconds, "weights": weights, "growth": peak - before, "work": peak - loaded}


if __name__ == "__main__":
    serve(evaluate)
