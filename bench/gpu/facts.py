"""Print the facts of this machine as JSON: python facts.py [PYTHON OF THE PEERS]."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from timing_and_tables import gather_facts, processor


def facts_of(peers_python: str = "") -> dict[str, Any]:
    facts = {"card": f"CPU {processor()}"}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        facts = {"card": found.name, "memory_gib": round(found.total_memory / 2**30, 1)}
        facts |= {"multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda}
    return facts | gather_facts(peers_python or None)


if __name__ == "__main__":
    print(json.dumps(facts_of(*sys.argv[1:])))
