"""Write ravel_answers.json: SAEBench 0.6.0's verdicts on many completions.

Needs the official package's file sae_bench/evals/ravel/validation.py, which imports nothing but the standard library:

    pip download --no-deps sae-bench==0.6.0 && unzip sae_bench-0.6.0-*.whl -d official
    python tests/golden/make_ravel_answers.py official/sae_bench/evals/ravel/validation.py

Zones with daylight saving are left out, because the official answer depends on the day.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

TEXTS = ["The country of X is", "latitude of X:", "its coordinates are", "people speak the language", "UTC"]
LABELS = ["Finland", "United States", "the United Kingdom", "South Korea", "North America", "Mandarin Chinese"]
LABELS += ["English,Spanish", "60.17", "-33.9", "Asia/Kolkata", "Africa/Abidjan", "Nowhere/Land", "", "Asia/Tokyo"]
COMPLETIONS = ["Finland. It", " fin", "finl", "", ' "Finland"', "the United States of", "United States", "England"]
COMPLETIONS += ["england", "Korea", "south korea is", "North America", "na", "NA ", "America", "Chinese", "mandarin"]
COMPLETIONS += ["Spanish and", "english", "61", "58.2 N", "about 33", "none", "+5:30", "+05:30", "+0:00", "-12:00"]
COMPLETIONS += ["+19:00", "+9", "+09:00", "+:30", "\\/x"]


def main(official_file: str) -> None:
    spec = importlib.util.spec_from_file_location("official", official_file)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    cases = itertools.product(TEXTS, LABELS, COMPLETIONS)
    right = "".join(str(int(bool(official.evaluate_completion(*case)))) for case in cases)
    golden = {"texts": TEXTS, "labels": LABELS, "completions": COMPLETIONS, "right": right}
    Path(__file__).with_name("ravel_answers.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
