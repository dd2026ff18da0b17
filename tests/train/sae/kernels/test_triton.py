"""The GPU's kernels: on a GPU as they are, elsewhere interpreted on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saemill.train.sae.kernels import hardware
from saemill.train.sae.kernels.sparse_products_with_gradients import affine, decode_at
from saemill.train.sae.kernels.sparse_support import Support, support_from_topk
from saemill.train.sae.kernels.triton import exact_top_k, row_update, sparse_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"  # interpreted, all of what is cut here would take minutes
pytestmark = pytest.mark.either


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*shape: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=rng).to(dtype).to(DEVICE)


def first_of_equals(pre: Tensor, k: int) -> Tensor:
    """int32 [B, k] in rising order: the k largest of each row, of equal ones the first."""
    order = torch.sort(pre.double(), dim=1, descending=True, stable=True).indices[:, :k]
    return order.sort(dim=1).values.to(torch.int32)


SHAPES = [
    (3, 17, 1),
    (4, 1000, 64),  # not a power of two
    (2, 8192, 16),  # exactly one segment
    (2, 20000, 512),  # three segments, the last one short
    (1, 8200, 100),  # the last segment holds fewer than k
    (2, 64, 64),  # everything
]


@pytest.mark.parametrize(
    ("dtype", "num_rows", "width", "k"),
    [(torch.float32, *shape) for shape in SHAPES]
    + [(torch.bfloat16, *shape) for shape in (SHAPES if ON_GPU else [SHAPES[1], SHAPES[3]])],
)
def test_rows_keep_their_k_largest(rng, dtype, num_rows, width, k):
    pre = normal(num_rows, width, rng=rng, dtype=dtype)
    assert torch.equal(exact_top_k.top_latents(pre, k), first_of_equals(pre, k))


def test_rows_may_lie_anywhere_in_memory(rng):
    """A kernel that took one row to begin where the one before ends would choose other latents."""
    pre = normal(100, 3, rng=rng).t()
    assert torch.equal(exact_top_k.top_latents(pre, 5), first_of_equals(pre, 5))
    for found, expected in zip(
        exact_top_k.top_of_batch(pre, 9), exact_top_k.top_of_batch(pre.contiguous(), 9), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [0.5, 0.0, -2.0])
def test_of_equal_entries_the_first_are_kept(rng, value):
    pre = normal(2, 2500, rng=rng)
    pre[0] = value
    pre[1, 10:2490] = pre[1].max()
    assert torch.equal(exact_top_k.top_latents(pre, 40), first_of_equals(pre, 40))


BATCHES = [(3, 17, 1), (4, 1000, 250), (3, 9000, 9001), (5, 8, 40)]


@pytest.mark.parametrize(
    ("dtype", "num_rows", "width", "count"),
    [(torch.float32, *shape) for shape in BATCHES]
    + [(torch.bfloat16, *shape) for shape in (BATCHES if ON_GPU else BATCHES[1:2])],
)
def test_a_batch_keeps_its_largest(rng, dtype, num_rows, width, count):
    pre = normal(num_rows, width, rng=rng, dtype=dtype)
    pre[1, : width // 2] = pre.max()  # a crowded row, full of equals
    pre[0, :] = -1.0  # an empty one, for small counts
    offsets, latents = exact_top_k.top_of_batch(pre, count)
    expected = torch.sort(pre.double().view(-1), descending=True, stable=True).indices[:count].sort().values
    found = torch.repeat_interleave(torch.arange(num_rows, device=DEVICE), offsets.diff().long()) * width + latents
    assert offsets.dtype == latents.dtype == torch.int32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "has_room"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_batch_of_unlike_rows_keeps_its_largest(rng, monkeypatch, dtype, has_room):
    """One row keeps seven times its share, and is searched among what it offers; or it is full of equals."""
    num_rows, width, share = 10, 2100, 25
    pre = normal(num_rows, width, rng=rng, dtype=dtype)
    pre[5] *= 2
    if not has_room:
        pre[5, ::2] = pre.max()
    offer, offered = exact_top_k._make_offers, []
    monkeypatch.setattr(exact_top_k, "_make_offers", lambda *told: offered.append(offer(*told)) or offered[-1])
    offsets, latents = exact_top_k.top_of_batch(pre, num_rows * share)
    expected = torch.sort(pre.double().view(-1), descending=True, stable=True).indices[: num_rows * share].sort().values
    found = torch.repeat_interleave(torch.arange(num_rows, device=DEVICE), offsets.diff().long()) * width + latents
    assert torch.equal(found, expected)
    ((_, offers, room),) = offered
    assert offers.argmax() == 5 and offers[5] > 7 * share and (offers[5] <= room) == has_room


def supports(rng: torch.Generator) -> dict[str, Support]:
    def chosen(num_rows: int, width: int, k: int) -> Tensor:
        return torch.rand(num_rows, width, generator=rng).topk(k).indices.to(DEVICE)

    crowded = chosen(150, 40, 3)
    crowded[:, 0] = 0  # one latent in every row; chunks of its entries are added beforehand
    crowded[:, 1:].clamp_min_(1)
    crowded[:, 2] = torch.where(crowded[:, 2] == crowded[:, 1], (crowded[:, 1] % 38) + 2, crowded[:, 2])
    ragged = Support(
        torch.tensor([0, 0, 5, 5, 6], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 3, 4, 8, 9, 3], dtype=torch.int32, device=DEVICE),
        11,
    )
    return {
        "k is 1": support_from_topk(chosen(9, 11, 1), 11),
        "k is 512": support_from_topk(chosen(2, 514, 512), 514),
        "one latent in every row": support_from_topk(crowded, 40),
        "rows and latents without entries": ragged,
    }


SUPPORTS = ["k is 1", "k is 512", "one latent in every row", "rows and latents without entries"]
FEW = SUPPORTS if ON_GPU else [name for name in SUPPORTS if name != "k is 512"]
few_supports = pytest.mark.parametrize("support", FEW, indirect=True)


@pytest.fixture(params=SUPPORTS)
def support(request, rng) -> Support:
    return supports(rng)[request.param]


def dense(support: Support, values: Tensor) -> Tensor:
    """float64 [B, F]."""
    table = torch.zeros(support.num_rows, support.num_latents, dtype=torch.float64, device=DEVICE)
    return table.index_put((support.rows.long(), support.latents.long()), values.double(), accumulate=True)


@pytest.mark.parametrize(
    ("support", "width"),
    [(name, 5) for name in SUPPORTS] + [(name, 520) for name in (SUPPORTS if ON_GPU else SUPPORTS[2:])],
    indirect=["support"],
)
def test_products_are_those_of_the_dense_formula(support, rng, width):
    values = normal(support.latents.numel(), rng=rng)
    x, W = normal(support.num_rows, width, rng=rng), normal(support.num_latents, width, rng=rng)
    acts, turned = dense(support, values), support.by_latent
    close = {"rtol": 1e-5, "atol": 1e-5}
    decoded = sparse_products.bag_sum(W, support.latents, support.offsets, values)
    torch.testing.assert_close(decoded.double(), acts @ W.double(), **close)
    gradient = sparse_products.bag_sum(x, turned.rows, turned.offsets, values[turned.order])
    torch.testing.assert_close(gradient.double(), acts.t() @ x.double(), **close)
    dots = sparse_products.pair_dots(W, turned.latents, x, turned.rows, turned.order)
    expected = (x.double() @ W.double().t())[support.rows.long(), support.latents.long()]
    torch.testing.assert_close(dots.double(), expected, **close)
    sums = sparse_products.segment_sum(values[turned.order], turned.offsets)
    torch.testing.assert_close(sums.double(), acts.sum(0), **close)


@few_supports
def test_gradients_from_rows_in_bfloat16_are_near_those_in_float64(support, rng, monkeypatch):
    """What is decoded stays float32."""
    monkeypatch.setattr(hardware, "SERVED", {DEVICE})
    monkeypatch.setattr(hardware, "has_triton", lambda device: True)
    rows, latents = support.rows.long(), support.latents.long()
    x, W, V = (normal(count, 40, rng=rng) for count in (support.num_rows, *[support.num_latents] * 2))
    b = normal(support.num_latents, rng=rng)
    ours, exact = (
        [own.detach().to(dtype).requires_grad_() for own in (W, V, b)] for dtype in (torch.float32, torch.float64)
    )
    found = decode_at(affine(x, None, ours[0], ours[2], support, None, "bfloat16"), ours[1], None, support, "bfloat16")
    pre = x.double() @ exact[0].t() + exact[2]
    active = torch.zeros_like(pre, dtype=torch.bool).index_put((rows, latents), torch.ones_like(rows) > 0)
    expected = torch.where(active, pre, 0.0) @ exact[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    for decoded in (found, expected):
        decoded.square().sum().backward()
    for own, wanted in zip(ours, exact, strict=True):
        error = torch.linalg.vector_norm(own.grad.double() - wanted.grad)
        assert error <= 2**-7 * torch.linalg.vector_norm(wanted.grad)
        assert error > 0 or not wanted.grad.any()


@few_supports
@pytest.mark.parametrize("is_unit", [False, True])
@pytest.mark.parametrize("has_dense", [False, True])
def test_a_row_moves_as_adam_moves_the_table(support, rng, is_unit, has_dense):
    """Against the same steps on tables in float64: gradient, projection, Adam, unit length."""
    width, F = 37, support.num_latents
    start = torch.nn.functional.normalize(normal(F, width, rng=rng), dim=1)
    table, low = start.clone(), torch.empty_like(start, dtype=torch.bfloat16)
    moments = torch.zeros_like(table), torch.zeros_like(table)
    reference = torch.nn.Parameter(start.double())
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.02)
    for step in (1, 2):
        values = normal(support.latents.numel(), rng=rng)
        x = normal(support.num_rows, width, rng=rng)
        extra = normal(F, width, rng=rng) if has_dense else None
        turned = support.by_latent
        entries = turned.offsets, turned.latents, turned.rows, values[turned.order], x
        settings = adam_step(0.01, 0.99, 0.02, step)
        row_update.update_rows(table, moments, entries, settings, dense=extra, low=low, unit=is_unit)

        gradient = dense(support, values).t() @ x.double()
        gradient += 0 if extra is None else extra.double()
        with torch.no_grad():
            if is_unit:
                gradient -= reference * torch.linalg.vecdot(reference, gradient)[:, None]
            reference.grad = gradient
            adam.step()
            if is_unit:
                reference.div_(torch.linalg.vector_norm(reference, dim=1, keepdim=True))
    torch.testing.assert_close(table.double(), reference.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low.float(), table, rtol=2**-7, atol=0.0)  # the interpreter cuts off, a GPU rounds


def adam_step(lr: float, beta2: float = 0.999, weight_decay: float = 0.0, step: int = 1) -> row_update.AdamStep:
    betas = torch.tensor([0.9, beta2], dtype=torch.float64, device=DEVICE)
    return row_update.AdamStep(torch.tensor(lr, device=DEVICE), 1 - betas**step, 0.9, beta2, 1e-8, weight_decay)


def test_the_same_update_gives_the_same_bits(rng):
    support = supports(rng)["one latent in every row"]
    values, x = normal(support.latents.numel(), rng=rng), normal(support.num_rows, 64, rng=rng)
    start, turned = normal(support.num_latents, 64, rng=rng), support.by_latent
    found = []
    for _ in range(2):
        table, moments = start.clone(), (torch.zeros_like(start), torch.zeros_like(start))
        entries = turned.offsets, turned.latents, turned.rows, values[turned.order], x
        row_update.update_rows(table, moments, entries, adam_step(0.1), unit=True)
        found.append((table, *moments))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_frozen_table_stays_as_it_is(rng):
    support = supports(rng)["k is 1"]
    turned, table = support.by_latent, normal(11, 8, rng=rng)
    before, moments = table.clone(), (torch.zeros_like(table), torch.zeros_like(table))
    values = torch.full((support.latents.numel(),), torch.nan, device=DEVICE)
    entries = turned.offsets, turned.latents, turned.rows, values, normal(9, 8, rng=rng)
    settings = adam_step(0.1)
    row_update.update_rows(table, moments, entries, settings, torch.ones((), device=DEVICE))
    assert torch.equal(table, before) and not moments[0].any() and not moments[1].any()


def test_only_a_gpu_is_served_by_these_kernels(monkeypatch):
    """On a CPU they are interpreted, thousands of times slower: a test must ask for it."""
    assert not hardware.runs_triton(torch.zeros(1))
    monkeypatch.setattr(hardware, "SERVED", {"cuda", "cpu"})
    assert hardware.runs_triton(torch.zeros(1, device=DEVICE))
