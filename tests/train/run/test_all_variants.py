"""Every variant there is, in one fleet, from the store to a saved SAE that does what its result says."""

import json

import pytest
import torch
from click.testing import CliRunner

from saemill.cache_schema import to_float32
from saemill.train import load_sae
from saemill.train.cli import main
from saemill.train.kit.variant_registry import config_type, names
from saemill.train.sae.side_inputs import Side


@pytest.fixture(scope="module")
def fleet(big, tmp_path_factory):
    """The run, of all variants; each is told which layers this store has."""
    out = tmp_path_factory.mktemp("fleet")
    words = [word for name in names() for word in ("--variant", name)]
    for name in names():
        for key, value in (("layer", "3"), ("to_layer", "4"), ("layers", "[3,4]"), ("offsets", "[0,1]")):
            if hasattr(config_type(name)(), key):
                words += ["--set", f"{name}.{key}={value}"]
    words += ["--cache", big["path"], "--device", "cpu", "--no-plots"]
    words += ["--set", "data.batch_tokens=64", "--epochs", "1"]
    result = CliRunner().invoke(main, [*words, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out / "run_1"


@pytest.mark.parametrize("variant", names())
def test_the_saved_sae_is_the_one_that_was_validated(fleet, big, variant):
    """Explained variance and L0 on the raw held-out activations, by the plain formulas."""
    outcome = json.loads((fleet / "result.json").read_text())["saes"][variant]
    needs = config_type(variant)(
        **json.loads((fleet / "config.json").read_text())["saes"][variant]["config"] | {"optim": None}
    ).needs()
    sae = load_sae(fleet / variant)

    def raw(layers):
        parts = [to_float32(big["resid"][layer][920:960, 1:], "bfloat16") for layer in layers]
        return torch.cat([torch.from_numpy(part).flatten(0, 1) for part in parts], dim=1)

    x, target = raw(needs.inputs), raw(needs.targets or needs.inputs)
    with torch.no_grad():
        positions = torch.arange(1, big["tokens"].shape[1]).repeat(40)
        acts = sae.encode(x, Side({"position": positions}))
        x_hat = sae.skip(x, sae.decode(acts))
    assert float((acts != 0).sum(1).double().mean()) == pytest.approx(outcome["l0"], rel=1e-3)
    if len(needs.inputs) == 1:
        explained = 1 - (target - x_hat).square().sum() / (target - target.mean(0)).square().sum()
        assert float(explained) == pytest.approx(outcome["explained_variance"], abs=1e-3)
    assert outcome["validation_tokens"] == len(x)


def test_each_learned_something(fleet):
    lines = [json.loads(line) for line in (fleet / "metrics.jsonl").read_text().splitlines()]
    for variant in names():
        found = [line["explained_variance"] for line in lines if line["sae"] == variant]
        # Layers of this store have nothing to do with each other: a transcoder does no harm at best.
        assert found[-1] > (0.0 if config_type(variant)().needs().targets else max(found[0], 0.0))
