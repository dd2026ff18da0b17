"""Check results of `sae-eval` with the official validators; runs in sae-bench's environment.

python saebench_validate.py runs/run_1/evals/*/*_eval_results.json
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jsonschema
import sae_bench.evals
from pydantic import TypeAdapter

OUTPUTS = {
    "core": ("core", "CoreEvalOutput"),
    "sparse_probing": ("sparse_probing", "SparseProbingEvalOutput"),
    "scr": ("scr_and_tpp", "ScrEvalOutput"),
    "tpp": ("scr_and_tpp", "TppEvalOutput"),
    "unlearning": ("unlearning", "UnlearningEvalOutput"),
    "absorption_first_letter": ("absorption", "AbsorptionEvalOutput"),
    "ravel": ("ravel", "RAVELEvalOutput"),
}


def validate(path: Path) -> str:
    """Validate with the pydantic model and the JSON schema that sae-bench ships for this kind of result."""
    text = path.read_text()
    kind = json.loads(text)["eval_type_id"]
    if kind not in OUTPUTS:
        return f"{path}: {kind} is not one of SAEBench's evaluations"
    folder, name = OUTPUTS[kind]
    module = importlib.import_module(f"sae_bench.evals.{folder}.eval_output")
    TypeAdapter(getattr(module, name)).validate_json(text)
    root = Path(sae_bench.evals.__path__[0]) / folder
    schema = json.loads((root / f"eval_output_schema_{kind}.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return f"{path}: valid"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(validate(Path(argument)))
