"""A member of a fleet trains to the bits it has alone."""

import json

import torch
from safetensors.torch import load_file


def final_state(run, label):
    folder = sorted((run / "checkpoints").glob("step_*"))[-1]
    return load_file(folder / f"{label}.safetensors")


def test_members_are_as_if_alone(big, sae_train, quick, tmp_path):
    """Two variants, two sparsities, two seeds: eight SAEs, each equal to its solo run."""
    common = [*quick, "--cache", big["path"], "--tokens", 1280]
    sae_train("--variant", "topk", "--variant", "batchtopk", "--grid", "k=2,4", "--grid", "seed=0,1", *common)
    fleet = tmp_path / "runs/run_1"
    labels = sorted(path.parent.name for path in fleet.glob("*/cfg.json"))
    assert len(labels) == 8 and "topk_k2_seed1" in labels
    for variant, k, seed in (("topk", 2, 1), ("batchtopk", 4, 0)):
        name = f"alone_{variant}"
        sae_train("--variant", variant, "--k", k, "--seed", seed, *common, "--name", name)
        alone = final_state(tmp_path / "runs" / name, variant)
        member = final_state(fleet, f"{variant}_k{k}_seed{seed}")
        assert alone.keys() == member.keys()
        assert all(torch.equal(alone[key], member[key]) for key in alone)


def test_each_has_its_own_lines(big, sae_train, quick, tmp_path):
    sae_train("--variant", "topk", "--grid", "lr=1e-3,1e-4", *quick, "--cache", big["path"], "--tokens", 1280)
    lines = [json.loads(line) for line in (tmp_path / "runs/run_1/metrics.jsonl").read_text().splitlines()]
    by_sae = {line["sae"]: line for line in lines}
    assert set(by_sae) == {"topk_lr0.001", "topk_lr0.0001"}
    result = json.loads((tmp_path / "runs/run_1/result.json").read_text())
    assert set(result["saes"]) == set(by_sae)


def test_a_fleet_reads_the_store_once(big, sae_train, quick, monkeypatch):
    """As many pieces are read for four SAEs as for one."""
    from saemill.cache_schema import Store

    reads = []
    read = Store.read

    def counting(self, request, span, out=None):
        reads.append(span)
        return read(self, request, span, out)

    monkeypatch.setattr(Store, "read", counting)
    common = [*quick, "--cache", big["path"], "--tokens", 1280]
    sae_train("--variant", "topk", *common)
    alone = len(reads)
    sae_train("--variant", "topk", "--grid", "k=1,2,3,4", *common)
    assert len(reads) - alone == alone > 5
