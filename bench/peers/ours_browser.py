"""Our browser for a run: all latents, timed from the call to the finished folder.

The time includes the evaluation's late imports, but not loading the SAE.
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
from saemill.evaluate.evals.browser import evaluation
from saemill.evaluate.evals.browser.browser_folder import read_data, unpacked
from saemill.evaluate.evals.browser.config import Config
from saemill.evaluate.run.find_saes_to_evaluate import find_subjects
from saemill.harvest.progress import Watch


def make(request: dict[str, Any]) -> dict[str, Any]:
    keep_large_blocks()
    home = Path(request["run"])
    context = Context(Store.open(request["store"]), watch=Watch(is_quiet=True))
    subjects = find_subjects([str(home)], home.parent)
    start = perf_counter()
    (result,) = evaluation.evaluate(context, subjects, Config(windows=request["windows"]))
    seconds = perf_counter() - start
    browser = home / "browser"
    columns = read_data(browser, f"sae_{subjects[0].label}/columns")
    assert columns is not None
    tokens = result.metrics["firing"]["tokens"]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "densities": (unpacked(columns["fired"]) / tokens).tolist(),
        "bytes": sum(file.stat().st_size for file in browser.rglob("*") if file.is_file()),
        "peak": resident("VmHWM"),
    }


if __name__ == "__main__":
    serve(make)
