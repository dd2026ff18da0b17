"""The tutorial notebook: kept without outputs, and run as it stands, on less text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CELLS = json.loads((Path(__file__).parent.parent / "docs" / "tutorial.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SMALLER = {'"300k"': '"30k"', "width=512, k=16, epochs=4": 'width=64, k=16, epochs=1, set={"data.batch_tokens": 512}'}
SMALLER |= {'{"browser.windows": 256}': '{"browser.windows": 64, "core.n_eval_reconstruction_batches": 1}'}


def test_the_notebook_is_kept_without_outputs():
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]
    assert all(word in "".join(CODE) for word in SMALLER)


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in CODE:
        for word, smaller in SMALLER.items():
            code = code.replace(word, smaller)
        exec(code, names)
    assert set(names["of_one_token"]) == {"topk", "standard"}
    assert capsys.readouterr().out.count("latent ") >= 3
    assert (tmp_path / "runs/run_1/browser/index.html").is_file()
