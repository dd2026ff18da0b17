"""Two processes on half a batch each, against one process on all of it."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(spawn, words, **options):
    """The command as `torchrun` would start it, twice."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [spawn(*words, **where, RANK=str(r), LOCAL_RANK=str(r), **options) for r in range(2)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_two_processes_train_as_one(big, spawn, sae_train, quick, tmp_path, variant):
    """Weights agree within rounding, and only rank 0 speaks and writes."""
    words = ["--variant", variant, *quick, "--cache", big["path"], "--tokens", 64 * 30]
    words += ["--set", "encoder_product=float32"]
    sae_train(*words, "--name", "one")
    first, second = launch(spawn, [*words, "--name", "two"])
    assert "next: sae-eval two" in first and second.strip() == ""
    one, two = (load_file(tmp_path / f"runs/{name}/{variant}/sae_weights.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-4), key
    start, end = (json.loads((tmp_path / f"runs/{name}/result.json").read_text()) for name in ("one", "two"))
    assert end["tokens"] == start["tokens"]
    assert end["saes"][variant]["l0"] == pytest.approx(start["saes"][variant]["l0"], rel=1e-2)
