"""Settings of evaluations on labelled texts: which data, and for scr and tpp how probes are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...context.context import Context
from ...context.evaluation_data_sets import Revision
from ...context.usable_saes import official_config
from .ablation import Kind
from .choose_source import DataChoice, Source
from .fit_probes import Training

ALL_N = (2, 5, 10, 20, 50, 100, 500)
TEST_BATCH = 500  # SAEBench's, of no effect: reported for its schema
LEAST = {"train_set_size": 4, "test_set_size": 4, "context_length": 2}
"""A text of each class with each value of the other label, and a token after BOS."""
LEAST_PERTURBED = LEAST | {"n_values": 1, "probe_train_batch_size": 1, "probe_epochs": 1}

S = TypeVar("S", bound="DataSettings")


@dataclass(frozen=True)
class DataSettings(DataChoice):
    """Which texts, and how many."""

    train_set_size: int | None = None
    """Rows of one probe, half of them the class; None: 4000 of the hub's data, 320 of this Python's text."""
    test_set_size: int | None = None
    """The same for tests; None: 1000 and 160."""
    context_length: int | None = None
    """None: 128 tokens of the hub's data, 48 of this Python's text."""

    @property
    def sizes(self) -> tuple[int, int]:
        assert self.train_set_size is not None and self.test_set_size is not None, "filled in first"
        return self.train_set_size, self.test_set_size


@dataclass(frozen=True)
class Settings(DataSettings):
    """The settings of scr and tpp; the defaults are SAEBench's."""

    probe_train_batch_size: int = 16
    """Decides how much of a spurious correlation a probe learns: results with another value do not compare."""
    probe_epochs: int = 20
    probe_lr: float = 1e-3
    probe_l1_penalty: float = 1e-3
    early_stopping_patience: int = 20
    n_values: tuple[int, ...] = ALL_N

    @property
    def training(self) -> Training:
        return Training(
            self.probe_train_batch_size,
            self.probe_epochs,
            self.probe_lr,
            self.early_stopping_patience,
            self.probe_l1_penalty,
        )


def filled(settings: S, source: Source, names: Sequence[str], most: int | None = None) -> S:
    """The settings, completed with what the data decide; by default at most `most` texts."""
    train_size, test_size = (min(size, most or size) for size in (source.train_size, source.test_size))
    return replace(
        settings,
        data=source.name,
        dataset_names=settings.dataset_names or tuple(names),
        train_set_size=settings.train_set_size or train_size,
        test_set_size=settings.test_set_size or test_size,
        context_length=settings.context_length or source.context,
    )


def config_of_round(
    settings: Settings, context: Context, source: Source, kind: Kind, names: Sequence[str], pairs: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of scr and tpp as their results give them."""
    return official_config(
        context,
        replace(settings, dataset_names=tuple(names)),
        perform_scr=kind == "absolute",
        probe_test_batch_size=TEST_BATCH,
        sae_batch_size=125,
        lower_vram_usage=False,
        column1_vals_lookup=pairs,
        **of_data(source, source.revision(names)),
    )


def of_data(source: Source, revision: Revision | None) -> dict[str, Any]:
    """Our own entries: which data, and in which precision the SAEs computed."""
    return {"data": source.name, "data_revision": revision, "sae_dtype": "float32"}
