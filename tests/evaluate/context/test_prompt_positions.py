"""Reading single tokens: any lengths in one batch, SAEs that read more than the residual, memory that runs out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saemill.evaluate.context import prompt_positions
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.prompt_positions import Reader, Spot
from saemill.evaluate.context.saes_usable_on_text import split_fitting
from saemill.evaluate.errors import NotApplicable, WidthMismatch

SPOTS = [Spot((2, 9, 4, 7), -1), Spot((2, 5), -1), Spot((2, 8, 8, 6, 3, 11), -4)]


@pytest.fixture(scope="module")
def model(world, language_model):
    made = language_model(world.model)
    made.encoder = SimpleNamespace(bos_token=2, special_tokens=(0, 1, 2))
    return made


def ignore(_: int) -> None:
    """Nobody watches."""


def test_each_spot_is_read_as_if_it_were_alone(model, builder):
    subject = builder.subject(builder.make_sae())
    read = Reader(model, [subject], None, batch_size=3).read(SPOTS, ignore)
    for row, spot in enumerate(SPOTS):
        alone = model.resid(torch.tensor([spot.tokens]), (subject.layer,))[subject.layer][0, spot.position]
        torch.testing.assert_close(read.x[subject.layer][row], alone)
    rows = torch.tensor([2, 0])
    acts = read.acts_of(subject, rows)
    torch.testing.assert_close(acts, subject.sae.encode(read.x[subject.layer][rows]))
    torch.testing.assert_close(read.columns_of(subject, torch.tensor([5, 1]))[rows], acts[:, [5, 1]])


class FiresByPosition:
    """Stands for an SAE with side inputs: its activation is the position."""

    needs, width, together = frozenset({"position"}), 2, 1

    def __init__(self, layer):
        self.layer, self.layers, self.target_layers = layer, (layer,), (layer,)

    def encode(self, batch):
        return torch.arange(batch.context).float()[None, :, None].expand(*batch.tokens.shape, self.width)


def test_saes_that_need_side_inputs_are_encoded_where_they_have_them(model, builder):
    subject = FiresByPosition(builder.LAYER)
    read = Reader(model, [subject], None, batch_size=2).read(SPOTS, ignore)
    assert read.acts_of(subject, torch.arange(3))[:, 0].tolist() == [3, 1, 2]
    assert read.columns_of(subject, torch.tensor([1])).tolist() == [[3], [1], [2]]


class FiresSeldom(FiresByPosition):
    """One latent of very many fires, by how far in its prompt the token stands."""

    width = 1 << 16

    def encode(self, batch):
        acts = torch.zeros(*batch.tokens.shape, self.width)
        acts[..., 7] = torch.arange(batch.context) - 2.5
        return acts


def test_of_saes_that_need_side_inputs_no_dense_activations_are_kept(model, builder):
    subject = FiresSeldom(builder.LAYER)
    read = Reader(model, [subject], None, batch_size=2).read(SPOTS, ignore)
    kept = read.acts[subject]
    assert kept.nnz == 3 and sum(part.nbytes for part in (kept.data, kept.indices, kept.indptr)) < 100
    dense = read.acts_of(subject, torch.tensor([2, 0, 2]))
    assert dense.dtype == torch.float32 and dense.shape == (3, 1 << 16)
    assert dense[:, 7].tolist() == [-0.5, 0.5, -0.5] and dense.count_nonzero() == 3
    assert torch.cat(list(read.all_acts_of(subject)))[:, 7].tolist() == [0.5, -1.5, -0.5]


def test_a_batch_that_does_not_fit_is_halved(model, builder, monkeypatch):
    subject = builder.subject(builder.make_sae())
    whole = Reader(model, [subject], None, batch_size=3).read(SPOTS, ignore)
    run, said = prompt_positions.run_windows, []

    def tight(model, tokens, valid, layers, attention):
        if len(tokens) > 1:
            raise MemoryError("full")
        return run(model, tokens, valid, layers, attention)

    monkeypatch.setattr(prompt_positions, "run_windows", tight)
    pieces = Reader(model, [subject], None, 3, said.append).read(SPOTS, ignore)
    torch.testing.assert_close(pieces.x[subject.layer], whole.x[subject.layer])
    assert "1 prompts at a time" in said[-1]


def test_saes_of_other_widths_or_of_several_layers_are_named_with_the_reason(model, builder):
    good = builder.subject(builder.make_sae(), "good")
    wide = builder.subject(builder.make_sae(d_in=builder.D + 1), "wide")
    high = builder.subject(builder.make_sae(), "high", layers=(9,))
    cross = builder.subject(builder.make_sae(), "cross", layers=(1,), target_layers=[2])
    fitting, failures = split_fitting(Context(None), [good, wide, high, cross], model, lambda: 0)
    assert fitting == [good]
    assert [type(failure.error) for failure in failures] == [WidthMismatch, WidthMismatch, NotApplicable]
