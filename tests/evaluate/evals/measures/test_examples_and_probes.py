"""The strongest activations of a stream, and probes that find planted order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.evaluate.evals.measures.position import accuracy, best_latents
from saemill.evaluate.evals.measures.tiers import Strongest


@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_batches_give_what_the_whole_stream_gives(seed, sizes, kept):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.relu(torch.randn(sum(sizes), 4, generator=generator))
    found, first = Strongest.none(kept, 4), 0
    for part in acts.split(sizes):
        found = found.with_batch(part, torch.arange(first, first + len(part)))
        first += len(part)
    for latent in range(4):
        order = acts[:, latent].argsort(descending=True)
        expected = [(float(acts[i, latent]), int(i)) for i in order[:kept] if acts[i, latent] > 0]
        assert found.of(latent) == expected


def test_a_probe_finds_the_latent_that_knows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    rows = torch.randn(600, 20, generator=generator)
    rows[:, 7] += 4 * (labels == 2)
    rows[:, 3] += 4 * (labels == 1)
    assert set(best_latents(rows, labels, 2).tolist()) == {3, 7}
    found, has_converged = accuracy(rows[:300], labels[:300], rows[300:], labels[300:], 2)
    assert found > 0.9 and has_converged
    shuffled = labels[torch.randperm(600, generator=generator)]
    by_chance, _ = accuracy(rows[:300], shuffled[:300], rows[300:], shuffled[300:], 2)
    assert by_chance == pytest.approx(1 / 3, abs=0.1)


def test_a_latent_that_never_fires_harms_no_probe():
    labels = torch.arange(40) % 2
    rows = torch.stack([labels.float(), torch.zeros(40)], dim=1)
    assert accuracy(rows, labels, rows, labels, None)[0] == 1.0
