"""Shared by the tests of training: seeded tensors, small configs, and a store to train on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saemill.cache_schema import (
    AttentionCsr,
    AttentionSpec,
    CorpusSpec,
    Manifest,
    ModelSpec,
    Site,
    from_float32,
)
from saemill.train.data.batch import AttentionRows, Batch, Needs
from saemill.train.disk.sae_lens_folder import CONFIG, WEIGHTS
from saemill.train.engine.step import Report, Trainee
from saemill.train.engine.terms_and_constraints import Assembly
from saemill.train.kit.variant_registry import config_type
from saemill.train.kit.wrapping import BASE_SETTINGS
from saemill.train.sae.gates import AbsTopK
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View

from ..write_shards import write_shards

D, ROWS, STEPS = 32, 512, 40
FOUND = 0.9  # the share of a planted dictionary that training must recover
SPAN = 32  # trainable tokens of a window
SMALL: dict[str, Any] = {"width": 96, "k": 6, "target_l0": 6.0, "layers": (1, 2), "dead_after_tokens": 2000}
SMALL |= {"context": 36, "layer_fractions": (0.5, 1.0)}
SPECIAL = 2
WIDTH, CONTEXT, HEADS, KEPT = 16, 8, 2, 3


@pytest.fixture(autouse=True)
def _global_random_state_stays() -> Iterator[None]:
    """Nothing in the package may draw from the global generator."""
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "drawn from torch's own generator, not from the assembly's"


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def planted(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [4096, 32] that each sum 3 of 48 unit directions, and the directions [48, 32]."""
    directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=rng), dim=1)
    chosen = torch.rand(4096, 48, generator=rng).topk(3, dim=1).indices
    strength = 1.0 + torch.rand(4096, 3, generator=rng)
    codes = torch.zeros(4096, 48).scatter_(1, chosen, strength)
    rows = codes @ directions
    return rows * (32**0.5 / rows.norm(dim=1).mean()), directions


def config_of(variant: str, **changes: Any) -> Any:
    cls = config_type(variant)
    known = {field.name for field in dataclasses.fields(cls)}
    if "base" in known:
        base = config_type(changes.get("base", cls().base))
        known -= set(BASE_SETTINGS) - {field.name for field in dataclasses.fields(base)}
    wanted = {name: value for name, value in (SMALL | changes).items() if name in known}
    return cls(**wanted)


def quick(variant: str, lr: float = 1e-3, start: str = "drawn", **changes: Any) -> Any:
    """A config with a learning rate for tests of tens of steps."""
    config = config_of(variant, **changes)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr, warmup_steps=0, start=start))


def batches(config: Any, count: int, rows: int = ROWS, seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    needs = config.needs()

    def draw(layers: tuple[int, ...]) -> Tensor:
        return torch.randn(rows, D * len(layers), generator=generator)

    def batch() -> Batch:
        noise = None if needs.targets is None else draw(needs.targets)
        x = draw(needs.inputs)
        target = None if noise is None else x.roll(1, 1) + 0.5 * noise  # partly predictable
        return Batch(x, target, side_of(needs, rows, generator))

    return [batch() for _ in range(count)]


def side_of(needs: Needs, rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Side inputs of rows in windows of SPAN trainable tokens after one special token."""
    windows = -(-rows // SPAN)
    window, position = torch.arange(rows) // SPAN, torch.arange(rows) % SPAN + 1
    side: dict[str, Any] = {}
    if needs.tokens:
        side["token"] = torch.randint(3, 50, (rows,), generator=generator)
    if needs.documents:
        side["document"] = window
    if needs.positions or needs.windows:
        side["position"] = position
    if needs.windows:
        row_of = torch.full((windows, SPAN + 1), -1)
        row_of[window, position] = torch.arange(rows)
        side |= {"window": window, "row_of": row_of}
    if needs.attention_layers:
        side["attention"] = {layer: attention_of(windows, generator) for layer in needs.attention_layers}
    return side


def attention_of(windows: int, generator: torch.Generator, context: int = SPAN + 1) -> AttentionRows:
    """Causal rows of HEADS heads; each keeps up to KEPT + 2 random keys, with part of the mass."""
    causal = torch.ones(context, context).tril().bool()
    scores = torch.randn(windows, HEADS, context, context, generator=generator)
    probs = scores.mul(2).masked_fill(~causal, -torch.inf).softmax(-1)
    kept = (probs >= probs.topk(KEPT + 2, dim=-1).values[..., -1:]) & (probs > 0)
    lengths = kept.sum(-1).flatten()
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return AttentionRows(indptr, kept.nonzero()[:, 3], probs[kept], (probs * kept).sum(-1))


def view_of(trainee: Trainee, batch: Batch) -> View:
    """The view of this batch that the terms of the next step would get."""
    side = Side(batch.side, trainee.assembly.knobs_at(trainee.step_index, trainee.total_steps))
    return trainee._view(batch, side)


def side_for(assembly: Assembly, batch: Batch) -> Side:
    """The side inputs that the module gets in the middle of a run."""
    return Side(batch.side, assembly.knobs_at(STEPS // 2, STEPS))


def train(
    config: Any, count: int = STEPS, trainee: Trainee | None = None, start: int = 0
) -> tuple[Trainee, list[Report]]:
    trainee = trainee or Trainee("one", config.build(D), STEPS)
    return trainee, [trainee.step(batch) for batch in batches(config, start + count)[start:]]


def changed_by_resuming(config: Any, steps: int) -> list[str]:
    """The names of tensors that differ between an uninterrupted run and one resumed halfway."""
    straight, _ = train(config, steps)
    stopped, _ = train(config, steps // 2)
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    resumed = Trainee("one", config.build(D), STEPS)
    resumed.load_state(state)
    train(config, steps - steps // 2, resumed, start=steps // 2)
    expected, found = straight.state(), resumed.state()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


def learn(config: Any, batches: list[Batch]) -> Trainee:
    """Train on all the batches, from the fitted start of real runs."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, start="fitted"))
    trainee = Trainee("one", config.build(D), len(batches))
    for batch in batches:
        trainee.step(batch)
    return trainee


def draw_unit(rng: torch.Generator, count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, D, generator=rng), dim=1)


def scaled(rows: Tensor) -> Tensor:
    return rows * (rows.shape[1] ** 0.5 / rows.norm(dim=1).mean())


def official(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction by the format's formulas."""
    config, w = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    pre = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"]
    match config.get("gate", config["architecture"]):
        case "standard":
            acts = torch.relu(pre + w["b_enc"])
        case "topk":
            kept = torch.topk(pre + w["b_enc"], config["k"], dim=-1)
            acts = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
        case "abstopk":
            kept = torch.topk((pre + w["b_enc"]).abs(), config["k"], dim=-1).indices
            acts = torch.zeros_like(pre).scatter(-1, kept, (pre + w["b_enc"]).gather(-1, kept))
        case "jumprelu":
            acts = torch.relu(pre + w["b_enc"]) * (pre + w["b_enc"] > w["threshold"])
        case "gated":
            magnitude = torch.relu(pre * w["r_mag"].exp() + w["b_mag"])
            acts = magnitude * (pre + w["b_gate"] > 0)
    return acts, acts @ w["W_dec"] + w["b_dec"]


def recovered(config: Any, rows: Tensor, directions: Tensor, steps: int = 600) -> float:
    """The share of planted directions that some decoder row finds; stops as soon as it is large enough."""
    trainee = Trainee("one", config.build(D), steps)
    generator = torch.Generator().manual_seed(0)
    side = side_of(config.needs(), ROWS, generator)
    share = 0.0
    for step in range(steps):
        trainee.step(Batch(rows[torch.randint(rows.shape[0], (ROWS,), generator=generator)], side=side))
        if step % 50 == 49:
            similarity = directions @ trainee.sae.W_dec.detach().t()
            if isinstance(trainee.sae.gate, AbsTopK):  # a latent may be a direction's opposite
                similarity = similarity.abs()
            share = float((similarity.amax(1) > 0.9).double().mean())
            if share >= FOUND:
                break
    return share


class Battery:
    """What tests of all variants share."""

    D, ROWS, STEPS, FOUND = D, ROWS, STEPS, FOUND
    config_of = staticmethod(config_of)
    quick = staticmethod(quick)
    batches = staticmethod(batches)
    side_of = staticmethod(side_of)
    side_for = staticmethod(side_for)
    view_of = staticmethod(view_of)
    attention_of = staticmethod(attention_of)
    train = staticmethod(train)
    changed_by_resuming = staticmethod(changed_by_resuming)
    official = staticmethod(official)
    recovered = staticmethod(recovered)


@pytest.fixture
def battery() -> type[Battery]:
    return Battery


def plant_residuals(rng, tokens, atoms=24, active=3):
    """Residuals that are sums of a few atoms, which an SAE can learn."""
    directions = rng.standard_normal((atoms, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = rng.integers(0, atoms, (*tokens.shape, active))
    weights = rng.uniform(2, 5, chosen.shape)
    return (directions[chosen] * weights[..., None]).sum(axis=-2).astype(np.float32)


def make_attention(rng, windows):
    """Causal rows of up to KEPT keys."""
    lengths = np.tile(np.minimum(np.arange(CONTEXT) + 1, KEPT), windows * HEADS)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    indices = np.concatenate([np.arange(length) for length in lengths]).astype(np.uint8)
    kept = rng.random((windows, HEADS, CONTEXT)).astype(np.float16)
    return AttentionCsr(indptr, indices, rng.random(len(indices)).astype(np.float16), kept)


def make_store(
    path,
    *,
    windows=300,
    shard_windows=32,
    layers=(3, 4),
    splits=(220, 260),
    seed=0,
    break_at=None,
    measured=False,
    massive=(),
    alike=(0, 0),
    scale=1.0,
    stored_as=None,
):
    """Write a store; return its arrays. `break_at`: a (layer, window) whose residuals become NaN, which moments include
    only if `measured`. `massive`: (layer, window, position) of rows that become 150 times as long. `alike`: windows
    that repeat one row. `scale`: a factor on all residuals."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 50, (windows, CONTEXT)).astype(np.uint32)
    tokens[:, 0] = SPECIAL
    documents = np.repeat(np.arange(windows) // 2, CONTEXT).reshape(windows, CONTEXT).astype(np.uint32)
    plain = {layer: plant_residuals(rng, tokens) for layer in layers}
    for values in plain.values():
        values[slice(*alike)] = values[0, 1]
        values *= scale
    for layer, window, position in massive:
        plain[layer][window, position] *= 150
    resid = {layer: from_float32(values, "bfloat16") for layer, values in plain.items()}
    attention = make_attention(rng, windows)
    sound = {layer: values.copy() for layer, values in resid.items()}
    if break_at is not None:
        resid[break_at[0]][break_at[1], 1:] = 0x7FC0
    manifest = Manifest(
        model=ModelSpec("test/model", WIDTH, special_tokens=(SPECIAL,), bos_token=SPECIAL),
        corpus=CorpusSpec("test/corpus", settings={"seed": seed}),
        context=CONTEXT,
        layers=layers,
        windows=windows,
        splits={"train": (0, splits[0]), "validation": splits, "test": (splits[1], windows)},
        attention=AttentionSpec(layers=layers, heads=HEADS, averaged=False, topk=KEPT),
        shard_windows=shard_windows,
        stored_as=stored_as,
    )
    stored, seen = ({Site("resid", layer): x for layer, x in rows.items()} for rows in (resid, sound))
    kept = dict.fromkeys(layers, attention)
    write_shards(path, manifest, tokens, documents, stored, kept, stored if measured else seen)
    return {"path": str(path), "tokens": tokens, "documents": documents, "resid": resid, "attention": attention}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The session's store: its arrays and its path."""
    return make_store(tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture(scope="session")
def write_store():
    """A function that writes further stores."""
    return make_store
