"""What MLPs and attention read and write, harvested in the same pass: every bit against transformers' own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from saemill.cache_schema import AttentionSpec, Request, Site, Store, StoreMismatch, from_float32, writer
from saemill.cache_schema.moments import is_special, measure
from saemill.cache_schema.verify_and_repair import repair, verify_shards
from saemill.harvest import run, stats
from saemill.harvest.capture import capture
from saemill.harvest.cli import main
from saemill.harvest.config import HarvestConfig, Worker, read_hooks
from saemill.harvest.errors import HookMissing, LayerOutOfRange, NonFiniteResidual, SettingInvalid
from saemill.harvest.model.architectures import ARCHITECTURES
from saemill.harvest.model.load_and_truncate import Wanted, truncate
from saemill.harvest.model.products_in_16_bits import linear
from saemill.harvest.progress import Watch
from saemill.harvest.run import reharvest

from .conftest import digest_of

Make = Callable[..., HarvestConfig]

EVERY = ("mlp_in", "mlp_out", "attn_out", "q", "k", "z")
BOTH = {"mlp_in": (1, 2), "mlp_out": (1, 2)}


def harvest(config: HarvestConfig) -> str:
    run.harvest(config, Watch(is_quiet=True))
    return config.out


def seen(model, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Layer by layer, what the modules of an eager model are given and give, read without a word of this package."""
    whole, layers = copy.deepcopy(model), []
    for layer in whole.base_model.h if hasattr(whole.base_model, "h") else whole.base_model.layers:
        found: dict[str, torch.Tensor] = {}
        layers.append(found)
        attention = part_of(layer, "self_attn", "attention", "attn")
        project = part_of(attention, "o_proj", "dense", "c_proj")
        ends = {"mlp_out": layer.mlp, "attn_out": attention}
        if hasattr(layer, "post_feedforward_layernorm"):
            ends = {"mlp_out": layer.post_feedforward_layernorm, "attn_out": layer.post_attention_layernorm}
        for hook, module in ends.items():
            module.register_forward_hook(
                lambda _m, _a, out, found=found, hook=hook: found.update(
                    {hook: out[0] if isinstance(out, tuple) else out}
                )
            )
        layer.mlp.register_forward_pre_hook(lambda _m, args, found=found: found.update(mlp_in=args[0]))
        project.register_forward_pre_hook(lambda _m, args, found=found: found.update(z=args[0]))
        norm = part_of(layer, "input_layernorm", "ln_1")
        norm.register_forward_hook(lambda _m, _a, out, found=found: found.update(normed=out))
        layer.register_forward_hook(lambda _m, args, out, found=found: found.update(before=args[0], after=out))
        found["attention"] = attention
    with torch.no_grad():
        whole(ids, use_cache=False)
    return layers


def part_of(module: Any, *names: str) -> Any:
    """The part that has one of these names."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def projected(layer: dict, hook: str) -> torch.Tensor:
    """Queries or keys, multiplied anew."""
    attention, x = layer["attention"], layer["normed"]
    if hasattr(attention, "q_proj"):
        projection = attention.q_proj if hook == "q" else attention.k_proj
        return linear(x, projection.weight, projection.bias)
    if hasattr(attention, "c_attn"):
        return attention.c_attn(x).split(x.shape[-1], dim=-1)["qk".index(hook)]
    heads = linear(x, attention.query_key_value.weight, attention.query_key_value.bias).unflatten(-1, (4, 3, 8))
    return heads[..., "qk".index(hook), :].flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_hooks_are_what_the_eager_modules_read_and_write(make_model, is_same, model_type, dtype):
    model = make_model(model_type, dtype)
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(1))
    layers = seen(model, ids)
    wanted = Wanted((2,), (1, 2, 3), dict.fromkeys(EVERY, (0, 2)))
    captured = capture(truncate(model, wanted), ids, AttentionSpec())
    resid = captured.acts.pop(Site("resid", 2))
    assert set(captured.acts) == {Site(hook, layer) for hook in EVERY for layer in (0, 2)}
    for (hook, layer), found in captured.acts.items():
        expected = projected(layers[layer], hook) if hook in "qk" else layers[layer][hook]
        assert found.dtype == dtype and is_same(found, expected), f"{hook} of layer {layer}"
    assert is_same(resid, layers[2]["after"])


@pytest.mark.parametrize("model_type", ["gemma2", "llama"])
def test_what_the_hooks_hold_adds_up_to_the_residual(make_model, model_type):
    """`mlp_out` and `attn_out` are what is added, after the norms that some families have behind them."""
    model = make_model(model_type)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    acts = capture(truncate(model, Wanted((1, 2), (), {"attn_out": (2,), "mlp_out": (2,)})), ids, AttentionSpec()).acts
    added = acts[Site("resid", 1)] + acts[Site("attn_out", 2)] + acts[Site("mlp_out", 2)]
    assert torch.equal(added, acts[Site("resid", 2)])


def test_nothing_is_left_on_the_modules_after_a_pass(make_model):
    model = truncate(make_model("gpt_neox"), Wanted(hooks=dict.fromkeys(EVERY, (0, 1))))
    capture(model, torch.ones(1, 8, dtype=torch.long), AttentionSpec())
    assert not any(module._forward_hooks for module in model.stack.modules())
    assert len(model.stack.layers) == 2


@pytest.fixture(scope="module")
def straight(settings_of: Make, tmp_path_factory) -> str:
    """A store with hooks, harvested in one go."""
    return harvest(settings_of(out=str(tmp_path_factory.mktemp("hooks") / "store"), hooks=BOTH))


def test_the_store_holds_them_with_their_moments(straight, model_folder):
    with Store.open(straight) as store:
        manifest = store.manifest
        assert manifest.format == 2
        assert manifest.sites == (Site("resid", 2), *(Site(hook, layer) for hook in BOTH for layer in (1, 2)))
        request = Request(layers=(2,), hooks=BOTH, tokens=True)
        parts = [store.read(request, span) for span in store.spans(request)]
        moments = {(hook, layer): store.moments(layer, hook) for hook, layers in BOTH.items() for layer in layers}
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, attn_implementation="eager")
    tokens = np.concatenate([part.tokens for part in parts])
    layers = seen(model, torch.from_numpy(tokens[:8].astype(np.int64)))  # a batch of the harvest
    special = is_special(tokens, manifest.model.special_tokens)
    for hook, numbers in BOTH.items():
        for layer in numbers:
            found = np.concatenate([part.acts[hook][layer] for part in parts])
            expected = from_float32(layers[layer][hook].float().numpy(), "bfloat16")
            np.testing.assert_array_equal(found[:8], expected)
            values = (found.astype(np.uint32) << 16).view(np.float32)
            again = measure(values, special)
            np.testing.assert_allclose(moments[hook, layer].mean, again.mean, rtol=1e-9, atol=1e-12)
            assert moments[hook, layer].mean_norm == pytest.approx(again.mean_norm, rel=1e-12)


@pytest.mark.usefixtures("share_only")
def test_workers_in_any_order_give_the_same_store(straight, make_config: Make):
    for index in (0, 2, 1):
        harvest(make_config(hooks=BOTH, worker=Worker(index, 3)))
    assert digest_of(make_config().out) == digest_of(straight)


def test_killed_and_resumed_is_the_same_store(straight, make_config: Make, model_folder, text_file, monkeypatch):
    """Stopped when the third shard's arrays lie there without their record, as a kill would leave them."""
    commit, done = writer.write_record, []

    def stopping(*args) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(commit(*args))

    monkeypatch.setattr(writer, "write_record", stopping)
    with pytest.raises(KeyboardInterrupt):
        harvest(make_config(hooks=BOTH))
    monkeypatch.undo()
    with Store.open(make_config().out) as store:
        assert store.committed.sum() == 2
    options = {"model": model_folder, "layer": 2, "attention-layers": "0..3", "dataset": text_file, "tokens": "4k"}
    options |= {"hooks": "resid,mlp_in:1..2,mlp_out:-1..+0", "context": 32, "shard-windows": 16, "batch-windows": 8}
    options |= {"device": "cpu", "out": make_config().out}
    resumed = CliRunner().invoke(main, [f"--{name}={value}" for name, value in options.items()])
    assert resumed.exit_code == 0, resumed.output
    assert "mlp_in" in resumed.output and "of layers 1, 2" in resumed.output
    assert digest_of(make_config().out) == digest_of(straight)


def test_a_damaged_hook_is_named_and_repaired(straight, make_config: Make, model_folder):
    out = harvest(make_config(hooks=BOTH))
    chunk = Path(out) / "mlp_out/layer_2/c.3.0.0"
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)
    with Store.open(out) as store:
        damage = [item for report in verify_shards(store) for item in report.damage]
    assert [(item.shard, item.array) for item in damage] == [(3, "mlp_out/layer_2")]
    repair(out, [3])
    reharvest(out, [3], "cpu", str(model_folder))
    assert digest_of(out) == digest_of(straight)


def test_hooks_without_residuals(make_config: Make):
    out = harvest(make_config(resid_layers=(), attention_layers=(), hooks={"attn_out": (1,), "k": (0,)}))
    with Store.open(out) as store:
        (first, *_) = store.stream(Request(hooks={"attn_out": (1,), "k": (0,)}))
        assert first.resid == {} and first.acts["attn_out"][1].shape == (16, 32, 16)
        assert first.acts["k"][0].shape == (16, 32, 8)
    digest_of(out)


def test_residuals_alone_are_the_bytes_of_format_1(make_config: Make, tmp_path):
    out, other = harvest(make_config()), harvest(make_config(out=str(tmp_path / "other"), hooks=BOTH))
    root = (Path(out) / "zarr.json").read_text()
    assert '"hooks"' not in root and '"format": 1' in root
    chunk = "resid/layer_2/c.0.0.0"
    assert (Path(out) / chunk).read_bytes() == (Path(other) / chunk).read_bytes()


def test_an_older_store_is_not_resumed_with_other_hooks(make_config: Make):
    out = harvest(make_config())
    before = digest_of(out)
    with pytest.raises(StoreMismatch, match=r"(?s)mlp_in.layers: the store has none, but 1, 2 was .*\n.*mlp_out"):
        harvest(make_config(hooks=BOTH))
    assert digest_of(out) == before


@pytest.mark.parametrize(
    ("hooks", "error", "message"),
    [
        ({"mlp_in": (4,)}, LayerOutOfRange, "mlp_in of layer 4: the model has layers 0 to 3.*--hooks"),
        ({"mlp_mid": (1,)}, HookMissing, "--hooks mlp_mid: .*have mlp_in, mlp_out.*did you mean"),
    ],
)
def test_hooks_that_a_model_lacks_end_before_work(make_config: Make, hooks, error, message):
    with pytest.raises(error, match=message):
        harvest(make_config(hooks=hooks))
    assert not Path(make_config().out).exists()


def test_hooks_on_the_command_line():
    assert read_hooks("resid,mlp_out", 4, (3, 4)) == {"resid": (3, 4), "mlp_out": (3, 4)}
    assert read_hooks("mlp_in:0..2, mlp_in:+1", 4, (4,)) == {"mlp_in": (0, 1, 2, 5)}
    with pytest.raises(SettingInvalid, match=r"--hooks resid,mlpin: unknown hook 'mlpin' \(did you mean 'mlp_in'"):
        read_hooks("resid,mlpin", 4, (4,))
    with pytest.raises(SettingInvalid, match="--hooks mlp_in: expected layers such as .*, found 'low'"):
        read_hooks("mlp_in:low", 4, (4,))
    contradicting = CliRunner().invoke(main, ["--hooks=mlp_in", "--resid-layers=1,2"])
    assert contradicting.exit_code == 1 and "Add resid" in contradicting.output


def test_a_hook_that_overflows_is_named(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    captured = capture(truncate(model, Wanted(hooks={"mlp_out": (1,)})), torch.randint(3, 60, (2, 24)), AttentionSpec())
    with pytest.raises(NonFiniteResidual, match="layer 1: the mlp_out at window 0"):
        stats.measure(1, captured.acts[Site("mlp_out", 1)], torch.zeros(2, 24, dtype=torch.bool), "mlp_out")
