"""One pass through a truncated model against the whole model run eagerly by transformers."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saemill.cache_schema import AttentionSpec, Site
from saemill.harvest.capture import capture, run
from saemill.harvest.errors import NonFiniteResidual
from saemill.harvest.model import attention as attend_module
from saemill.harvest.model.architectures import ARCHITECTURES
from saemill.harvest.model.attention import ATTENTION, register_attention
from saemill.harvest.model.load_and_truncate import Wanted, truncate
from saemill.harvest.sparsify_attention import to_csr
from saemill.harvest.stats import measure

ALL = Wanted(resid_layers=(0, 1, 2, 3, 4), attention_layers=(0, 1, 2, 3, 4))
DEFAULT = Wanted(resid_layers=(3,), attention_layers=(1, 2, 3, 4))  # layers L-2 .. L+1 of L = 3


def dense_attention(model, ids) -> dict[int, torch.Tensor]:
    blocks: dict[int, list[torch.Tensor]] = {layer: [] for layer in model.wanted.attention_layers}
    run(model, ids, {layer: parts.append for layer, parts in blocks.items()})
    return {layer: torch.cat(parts) for layer, parts in blocks.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [ALL, DEFAULT], ids=["all", "default"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_residuals_and_attention_are_those_of_the_eager_model(
    make_model, run_whole, is_same, model_type, wanted, dtype
):
    model = make_model(model_type, dtype)
    reference = run_whole(model)
    truncated = truncate(model, wanted)

    acts = run(truncated, reference.ids, {})
    assert sorted(acts) == [Site("resid", layer) for layer in wanted.resid_layers]
    for (_, layer), found in acts.items():
        assert found.dtype == dtype
        assert is_same(found, reference.resid[layer]), f"residual of layer {layer}"

    for layer, found in dense_attention(truncated, reference.ids).items():
        if layer < wanted.whole_layers:
            assert is_same(found, reference.attention[layer]), f"attention of layer {layer}"
        else:  # a projection cut down to queries and keys may add up in another order
            one_rounding = {} if dtype == torch.float32 else {"rtol": 0.1, "atol": 1e-3}
            torch.testing.assert_close(found, reference.attention[layer], **one_rounding)


def test_every_supported_architecture_has_a_tiny_model(model_types):
    assert sorted(model_types) == sorted(ARCHITECTURES)


@pytest.mark.parametrize(
    "change", [{"attn_logit_softcapping": None}, {"sliding_window": 64}, {"query_pre_attn_scalar": 8}], ids=str
)
def test_what_makes_gemma2_special_shows_in_the_reference(make_model, run_whole, change):
    """Otherwise the comparison above would not notice if we left it out."""
    usual, changed = run_whole(make_model("gemma2")), run_whole(make_model("gemma2", **change))
    assert not torch.allclose(usual.attention[1], changed.attention[1], atol=1e-2)


def test_neox_with_sequential_residual(make_model, run_whole):
    model = make_model("gpt_neox", use_parallel_residual=False)
    reference = run_whole(model)
    acts = run(truncate(model, DEFAULT), reference.ids, {})
    assert torch.equal(acts[Site("resid", 3)], reference.resid[3])


@pytest.mark.parametrize("averaged", [False, True])
def test_without_sparsification_the_csr_rebuilds_the_dense_attention(make_model, run_whole, averaged):
    model = make_model("gemma2")
    reference = run_whole(model)
    spec = AttentionSpec(averaged=averaged, topk=reference.ids.shape[1], mass=1.0)
    captured = capture(truncate(model, DEFAULT), reference.ids, spec)
    for layer, rows in captured.attention.items():
        dense = reference.attention[layer]
        expected = (dense.mean(1, keepdim=True) if averaged else dense).half().float().numpy()
        np.testing.assert_array_equal(to_csr(layer, rows).dense(), expected)


def test_blocks_of_windows_change_no_bit(make_model, run_whole, monkeypatch):
    model = truncate(make_model("gemma2"), DEFAULT)
    ids = torch.randint(0, 60, (5, 24))
    captures = []
    for room in (1, 2 * 4 * 4 * 24 * 24, 1 << 30):  # one window at a time, two (and one left over), all
        monkeypatch.setattr(attend_module, "CPU_BLOCK_BYTES", room)
        captures.append(capture(model, ids, AttentionSpec()))
    for other in captures[1:]:
        assert torch.equal(other.acts[Site("resid", 3)], captures[0].acts[Site("resid", 3)])
        for layer, rows in other.attention.items():
            assert torch.equal(rows.packed, captures[0].attention[layer].packed)
            assert torch.equal(rows.kept_mass, captures[0].attention[layer].kept_mass)


def test_attention_of_the_first_layer_alone(make_model, run_whole):
    model = make_model("llama")
    reference = run_whole(model)
    truncated = truncate(model, Wanted(attention_layers=(0,)))
    assert len(truncated.stack.layers) == 1
    assert torch.equal(dense_attention(truncated, reference.ids)[0], reference.attention[0])


def test_nothing_is_left_on_the_model_after_a_pass(make_model):
    model = truncate(make_model("llama"), DEFAULT)
    capture(model, torch.ones(1, 8, dtype=torch.long), AttentionSpec())
    assert not any(module._forward_hooks for module in model.stack.modules())


class LiveTensors(TorchDispatchMode):
    """Knows which dense attention tensors [windows, heads, T, T] are alive."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.seen = 0
        self.refs: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.seen += 1
            self.refs.append(weakref.ref(result))
        return result

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.refs)


def alive_at_layer_starts(model, live: LiveTensors, forward) -> list[int]:
    counts: list[int] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _module, _args: counts.append(live.alive()))
    with live, torch.no_grad():
        kept = forward()
    counts.append(live.alive())
    del kept
    return counts


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox"])
def test_dense_probabilities_of_one_layer_are_gone_before_the_next(make_model, run_whole, model_type):
    model = make_model(model_type)
    ids = torch.randint(0, 60, (4, 24))
    live = LiveTensors((4, 4, 24, 24))
    whole = copy.deepcopy(model)
    whole_counts = alive_at_layer_starts(whole.base_model, live, lambda: whole(ids, output_attentions=True))
    assert whole_counts == [0, 1, 2, 3, 4, 5]  # the counter works: asked for attentions, transformers keeps them all

    truncated = truncate(model, DEFAULT)
    live = LiveTensors((4, 4, 24, 24))
    counts = alive_at_layer_starts(truncated.stack, live, lambda: capture(truncated, ids, AttentionSpec()))
    assert counts == [0] * 6
    assert live.seen >= 5


def test_probabilities_do_not_outlive_their_layer_in_what_is_captured(make_model):
    captured = capture(truncate(make_model("gemma2"), DEFAULT), torch.ones(4, 24, dtype=torch.long), AttentionSpec())
    for rows in captured.attention.values():
        assert rows.packed.untyped_storage().nbytes() == 4 * 24 * 16 * 4


def test_a_model_that_overflows_is_stopped_by_layer(make_model):
    model = make_model("gemma2", torch.float16)
    with torch.no_grad():
        model.model.layers[2].post_feedforward_layernorm.weight.fill_(60_000)
    ids = torch.randint(0, 60, (2, 24))
    acts = run(truncate(model, Wanted(resid_layers=(1, 2))), ids, {})
    nothing_special = torch.zeros_like(ids, dtype=torch.bool)
    assert np.isfinite(measure(1, acts[Site("resid", 1)], nothing_special).mean_norm)
    with pytest.raises(NonFiniteResidual, match=r"layer 2: .* float16"):
        measure(2, acts[Site("resid", 2)], nothing_special)


def test_registering_twice_is_registering_once():
    from transformers import AttentionInterface

    register_attention()
    register_attention()
    assert AttentionInterface()[ATTENTION] is attend_module.attend
