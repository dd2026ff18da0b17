"""A judge on loopback, and a store on whose tokens latents fire as tests say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch

from saemill.evaluate.context.context import Context
from saemill.evaluate.evals.autointerp import judge as judge_module
from saemill.evaluate.evals.autointerp import passages
from saemill.evaluate.evals.autointerp.config import Config
from saemill.train.sae.kernels.codes import Codes

from ...fake_judge import FakeJudge, serving

KEY = "sk-very-secret-0123456789"


class Words:
    """A tokenizer of words."""

    def decode(self, ids, **_):
        return "".join(f" word{token}" for token in ids)


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv(judge_module.KEY, KEY)
    monkeypatch.setattr(judge_module, "WAITS", (0.01, 0.02, 0.04))
    with serving(FakeJudge()) as found:
        yield found


@pytest.fixture(scope="session")
def text_store(make_world):
    """200 windows of 24 tokens, each of 47."""
    tokens = torch.randint(3, 50, (200, 24), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 2
    return make_world(tokens=tokens, splits=(80, 120))


@pytest.fixture
def by_token(monkeypatch):
    """Latent l fires on the tokens l and l + 24, on later ones of a window more strongly."""

    def encode(subject, batch):
        tokens, position = batch.tokens[batch.keep], batch.keep.nonzero()[:, 1]
        acts = torch.nn.functional.one_hot(tokens % subject.width, subject.width) * (1 + position[:, None] / 10)
        return (Codes(acts.float(), None, len(acts), subject.width),)

    monkeypatch.setattr(passages, "encode_codes", encode)
    monkeypatch.setattr(Context, "tokenizer", property(lambda _: SimpleNamespace(backend=Words(), bos_token=2)))


@pytest.fixture
def config(judge):
    """config(**settings): for small windows."""
    return lambda **settings: Config(**{"endpoint": judge.url, "judge": "fake", "buffer": 2, "n_latents": 8} | settings)


def activations_of(acts_WTF, latents=None, rows_WT=None):
    """Dense activations as the second pass keeps them; each token is the number of its place."""
    windows, context, width = acts_WTF.shape
    latents = np.arange(width) if latents is None else np.array(latents)
    rows = np.arange(windows * context) if rows_WT is None else np.flatnonzero(rows_WT)
    table = scipy.sparse.csc_matrix(acts_WTF.reshape(-1, width)[rows][:, latents])
    return passages.Activations(np.arange(windows * context).reshape(windows, context), latents, rows, table)
