"""Pieces halve when memory runs out, and nothing is done twice or left out."""

from __future__ import annotations

import pytest
import torch

from saemill.evaluate.context.stored_windows import read_windows
from saemill.evaluate.errors import MemoryTooSmall
from saemill.evaluate.evals import replacement
from saemill.evaluate.evals.core import encoding
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.evals.measures.splice_effects import Tracers
from saemill.evaluate.model.smaller_pieces import PieceSize, in_pieces, is_out_of_memory

OUT = [
    MemoryError("no"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]


@pytest.mark.parametrize("error", OUT)
@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_pieces_cover_everything_once(error, fits):
    said = []

    def work(start, stop):
        if stop - start > fits:
            raise error
        return list(range(start, stop))

    size = PieceSize(8, "windows", said.append)
    parts = list(in_pieces(21, size, work))
    assert [item for part in parts for item in part] == list(range(21))
    assert max(map(len, parts)) <= fits
    assert said[-1] == f"out of memory: continuing with {size.size} windows at a time"


def test_what_never_fits_says_so():
    def work(start, stop):
        raise MemoryError("no room\nsecond line")

    with pytest.raises(MemoryTooSmall, match=r"not even one of the windows at a time .*no room\)"):
        list(in_pieces(3, PieceSize(2, "windows", lambda _: None), work))


def test_other_errors_pass():
    def work(start, stop):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_pieces(3, PieceSize(2, "windows", lambda _: None), work))
    assert not is_out_of_memory(MemoryTooSmall("x"))


def test_core_says_that_it_halves_and_gives_the_same_numbers(world, open_context, builder, monkeypatch):
    """The batch of the definitions stays whole, whatever goes in at once."""
    subject = builder.subject(builder.make_sae())
    config = core.Config(batch_size_prompts=4, resamples=10)
    (whole,) = core.evaluate(open_context(world), [subject], config)
    original = encoding.encode

    def tight(sae, x):
        if len(x) > 11:
            raise MemoryError("tight")
        return original(sae, x)

    monkeypatch.setattr(encoding, "encode", tight)
    context, said = open_context(world), []
    monkeypatch.setattr(context, "say", said.append)
    (halved,) = core.evaluate(context, [subject], config)
    assert any("continuing with 1 windows" in line for line in said)
    for group, values in whole.metrics.items():
        assert halved.metrics[group] == pytest.approx(values, rel=1e-5), group


def replace(context, subject):
    list(replacement.evaluate(context, [subject], replacement.Config(windows=4, batch_windows=2)))


def trace(context, subject):
    tracers = Tracers(context, [subject])
    for batch in read_windows(context, [subject], "t", windows=4, batch_windows=2):
        tracers.of(batch)


@pytest.mark.parametrize("work", [replace, trace])
def test_what_did_not_fit_in_one_batch_is_not_tried_in_the_next(work, world, open_context, builder, monkeypatch):
    context, said = open_context(world), []
    head = context.model.head

    def tight(hidden):
        if len(hidden) > 15:
            raise MemoryError("tight")
        return head(hidden)

    monkeypatch.setattr(context, "say", said.append)
    monkeypatch.setattr(context.model, "head", tight)
    work(context, builder.subject(builder.make_sae()))
    assert said and len(said) == len(set(said))
