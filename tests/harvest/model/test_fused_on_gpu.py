"""Kernels for norms, gated MLPs and attention of 16-bit models, interpreted: the model's own results, to a rounding."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from saemill.cache_schema import Site
from saemill.harvest.capture import run
from saemill.harvest.model import fused_on_gpu
from saemill.harvest.model.architectures import ARCHITECTURES
from saemill.harvest.model.load_and_truncate import Wanted, truncate
from saemill.harvest.shards import describe_device

pytest.importorskip("triton")

from saemill.harvest.model import triton_kernels

OFF = {torch.bfloat16: 2**-5, torch.float16: 2**-9}  # Triton's interpreter cuts bfloat16 off instead of rounding it


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels serve the CPU."""
    monkeypatch.setattr(fused_on_gpu, "SERVED", {"cuda", "cpu"})
    monkeypatch.setattr(fused_on_gpu, "TOLERANCE", OFF)
    works = fused_on_gpu._kernels_work
    works.cache_clear()
    yield
    works.cache_clear()


@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("from_one", [True, False])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_a_norm_is_its_definition(rng, dtype, from_one, width):
    x, weight = (3 * torch.randn(shape, generator=rng).to(dtype) for shape in ((2, 3, width), (width,)))
    x[1] *= 1e-3  # here epsilon counts
    found = triton_kernels.norm(x, weight, 1e-5, from_one)
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = normed * (1 + weight.double() if from_one else weight.double())
    assert found.dtype == dtype and found.shape == x.shape
    for one, other in zip(found.double(), expected, strict=True):
        assert (one - other).norm() < OFF[dtype] * other.norm()


@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu tanh"])
@pytest.mark.parametrize("rows", [1, 70])
def test_gates_are_their_definition(rng, dtype, activation, rows):
    """Of part of a program's elements, and of several programs'; also where the exponential overflows."""
    gate, up = 4 * torch.randn(2, rows, 50, generator=rng).to(dtype)
    gate[0, :3] = torch.tensor([-200.0, 0.0, 200.0])
    found = triton_kernels.gated(gate.t().contiguous().t(), up, activation)
    act = {"silu": functional.silu, "gelu tanh": partial(functional.gelu, approximate="tanh")}[activation]
    expected = act(gate.double()) * up.double()
    assert found.dtype == dtype and not found[0, 0].any()
    assert (found - expected).norm() < OFF[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("masks", [0, 1, 3])
def test_probabilities_are_those_of_eager_attention(rng, dtype, softcap, masks):
    """Without a mask, with one for all windows, and with one for each; from more keys than queries."""
    windows, heads, queries, keys = 3, 2, 5, 9
    scores = 8 * torch.randn(windows, heads, queries, keys, generator=rng).to(dtype)
    mask = None
    if masks:
        mask = torch.full((masks, 1, queries, keys), torch.finfo(dtype).min, dtype=dtype).triu(keys - queries + 1)
        mask[:, :, :, 0] = torch.where(torch.arange(masks) > 0, torch.finfo(dtype).min, 0.0)[:, None, None]
    found = triton_kernels.softmax_(scores.clone(), mask, 0.25, softcap)
    expected = plain(scores, mask, 0.25, softcap)
    assert (found - expected).norm() < OFF[dtype] * expected.norm()
    if masks:
        assert not found[..., 0, keys - queries + 1 :].any()


def plain(scores: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    scores = scores * scaling
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    scores = scores if mask is None else scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # a masked float16 score is minus infinity
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_models_give_the_same_to_a_rounding(make_model, run_whole, interpreted, monkeypatch, model_type):
    model = make_model(model_type, torch.float16)
    reference = run_whole(model)
    last = len(reference.resid) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        truncated = truncate(model, Wanted(resid_layers=(last,), attention_layers=(0, last)))
    norms = [module for module in truncated.stack.modules() if type(module).__name__.endswith("RMSNorm")]
    assert bool(norms) == (ARCHITECTURES[model_type].norm != "layer")
    gated = [module for module in truncated.stack.modules() if hasattr(module, "gate_proj")]
    assert bool(gated) == hasattr(model.base_model.layers[0].mlp if norms else model, "gate_proj")
    assert all("forward" in vars(module) for module in norms + gated)
    softmax, blocks = triton_kernels.softmax_, []
    monkeypatch.setattr(triton_kernels, "softmax_", lambda *given: blocks.append(1) or softmax(*given))
    attended: dict[int, list[Tensor]] = {0: [], last: []}
    found = run(truncated, reference.ids, {layer: parts.append for layer, parts in attended.items()})
    resid, expected = found[Site("resid", last)].float(), reference.resid[last].float()
    assert (resid - expected).norm() < 0.02 * expected.norm()
    assert len(blocks) > last
    for layer, parts in attended.items():
        attention, expected = torch.cat(parts).float(), reference.attention[layer].float()
        assert (attention - expected).norm() < 0.02 * expected.norm()


def test_what_a_kernel_does_not_serve_goes_through_the_model_s_own_norm(make_model, interpreted, monkeypatch):
    """A gradient, another type, a model that was moved."""
    plain = make_model("llama", torch.float16).model.layers[0].input_layernorm
    norm = truncate(make_model("llama", torch.float16), Wanted(resid_layers=(1,))).stack.layers[0].input_layernorm
    x = torch.randn(3, norm.weight.numel()).half()
    torch.testing.assert_close(norm(x), plain(x), rtol=OFF[torch.float16], atol=1e-3)
    monkeypatch.setattr(triton_kernels, "norm", None)
    learning = x.clone().requires_grad_()
    norm(learning).float().square().sum().backward()
    assert learning.grad is not None and learning.grad.any()
    norm.weight.requires_grad_()
    norm(x).float().square().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.any()
    norm.weight.requires_grad_(False)
    assert torch.equal(norm.float()(x.float()), plain.float()(x.float()))
    assert torch.equal(norm(x), plain(x))
    monkeypatch.setattr(fused_on_gpu, "SERVED", {"cuda"})
    assert torch.equal(norm.half()(x), plain.half()(x))


def test_a_gated_mlp_keeps_its_gradient_and_its_hooks(make_model, interpreted, monkeypatch):
    plain = make_model("gemma2", torch.float16).model.layers[0].mlp
    mlp = truncate(make_model("gemma2", torch.float16), Wanted(resid_layers=(1,))).stack.layers[0].mlp
    x, read = torch.randn(3, mlp.gate_proj.in_features).half(), []
    mlp.down_proj.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    torch.testing.assert_close(mlp(x), plain(x), rtol=OFF[torch.float16], atol=1e-3)
    assert len(read) == 1
    monkeypatch.setattr(triton_kernels, "gated", None)
    learning = x.clone().requires_grad_()
    mlp(learning).float().square().sum().backward()
    assert learning.grad is not None and learning.grad.any()
    assert torch.equal(mlp.float()(x.float()), plain.float()(x.float()))


def test_scores_that_need_a_gradient_keep_it(interpreted):
    scores = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    assert fused_on_gpu.serves_scores(scores)
    assert not fused_on_gpu.serves_scores(scores.requires_grad_())


def test_a_norm_whose_epsilon_is_another_is_not_replaced(make_model, interpreted):
    model = make_model("llama", torch.float16)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.eps, module.variance_epsilon = module.variance_epsilon, 0.1  # pyright: ignore
    with pytest.warns(UserWarning, match="the kernel for LlamaRMSNorm is not used") as told:
        truncated = truncate(model, Wanted(resid_layers=(1,)))
    assert len(told) == 1
    norms = [module for module in truncated.stack.modules() if type(module).__name__ == "LlamaRMSNorm"]
    assert not any("forward" in vars(module) for module in norms)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton would take the current one."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: taken.append(tensor) or nullcontext())
    x = torch.ones(2, 4).half()
    triton_kernels.norm(x, torch.ones(4).half(), 1e-5, False)
    triton_kernels.softmax_(x[None, None], None, 1.0, None)
    triton_kernels.gated(x[0], x[1], "silu")
    assert [tensor.shape for tensor in taken] == [(2, 4), (1, 1, 2, 4), (4,)]


@pytest.mark.parametrize("broken", ["wrong", "failing"])
def test_a_kernel_that_gives_something_else_is_not_used(make_model, run_whole, interpreted, monkeypatch, broken):
    """A card or compiler that was never tried must not write a store of wrong numbers."""

    def other(x: Tensor, *_: object) -> Tensor:
        if broken == "failing":
            raise RuntimeError("no C compiler")
        return x

    monkeypatch.setattr(triton_kernels, "norm", other)
    monkeypatch.setattr(triton_kernels, "gated", other)
    monkeypatch.setattr(triton_kernels, "softmax_", other)
    model = make_model("gemma2", torch.bfloat16)
    reference = run_whole(model)
    reason = {"wrong": "results are off by", "failing": "RuntimeError: no C compiler"}[broken]
    with pytest.warns(UserWarning, match=f"is not used, which is slower: .*{reason}"):
        truncated = truncate(model, Wanted(resid_layers=(1,)))
    resid = run(truncated, reference.ids, {})[Site("resid", 1)]
    assert torch.equal(resid, reference.resid[1])


def test_a_gpu_record_says_that_kernels_computed(interpreted, monkeypatch):
    """So that a repair by others is warned of."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(fused_on_gpu, "_kernels_work", lambda device, dtype: dtype == torch.bfloat16)
    device = torch.device("cuda", 0)
    assert describe_device(device, torch.bfloat16).name == "Card, kernels for norms, MLPs and attention"
    assert describe_device(device, torch.float32).name == "Card"


def test_a_cpu_s_models_are_left_alone(make_model):
    truncated = truncate(make_model("gemma2", torch.bfloat16), Wanted(resid_layers=(1,)))
    assert not any("forward" in vars(module) for module in truncated.stack.modules())
    assert not fused_on_gpu.serves_scores(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_a_gpu_s_models_are_served(make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truncated = truncate(make_model("gemma2", torch.bfloat16).cuda(), Wanted(resid_layers=(1,)))
    norms = [module for module in truncated.stack.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms and all("forward" in vars(module) for module in norms)
    assert fused_on_gpu.serves_scores(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, device="cuda"))
