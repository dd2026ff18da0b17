"""A session: SAEs, the stores they belong to, and the evaluations asked for, brought together.

SAEs of one store share a context, so that the store is opened and the model loaded once for them, and lie on the
device together as far as its memory allows. A store that is gone, or that is another one, fails the SAEs of that
store and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cache_schema import Store, StoreError, StoreMissing
from ..context.context import Context, DtypeName, open_context
from ..context.loaded_sae import LoadedSae
from ..context.progress import Watch
from ..context.results import Row
from ..errors import CacheIdMismatch, EvalError, StoreGone, WidthMismatch
from ..model.memory import room_for_weights, within
from .attempts import Keep, run_evals


@dataclass(frozen=True)
class Session:
    """What was asked for on the command line."""

    configs: Mapping[str, Any]
    device: torch.device
    watch: Watch
    cache: str | None = None
    model: str | None = None
    dtype: DtypeName | None = None
    from_tokens: bool = False
    keep: Keep = "none"

    def run(self, subjects: Sequence[LoadedSae]) -> list[Row]:
        """Every evaluation of every SAE."""
        rows: list[Row] = []
        for url, group in self._by_store(subjects).items():
            rows += self._run_group(url, group)
        return rows

    def _by_store(self, subjects: Sequence[LoadedSae]) -> dict[str | None, list[LoadedSae]]:
        groups: dict[str | None, list[LoadedSae]] = {}
        for subject in subjects:
            groups.setdefault(self.cache or subject.cache_url, []).append(subject)
        return groups

    def _run_group(self, url: str | None, subjects: Sequence[LoadedSae]) -> list[Row]:
        try:
            store = open_store(url, subjects)
        except (EvalError, StoreError) as error:
            return [row for subject in subjects for row in self._refused(subject, error)]
        with open_context(
            store,
            model_name=self.model,
            dtype_name=self.dtype,
            from_tokens=self.from_tokens,
            device=self.device,
            watch=self.watch,
        ) as context:
            return self._run_fitting(context, subjects)

    def _run_fitting(self, context: Context, subjects: Sequence[LoadedSae]) -> list[Row]:
        """Those SAEs that belong to this store."""
        rows: list[Row] = []
        fitting = []
        for subject in subjects:
            try:
                require_fit(subject, context.opened)
            except EvalError as error:
                rows += self._refused(subject, error)
            else:
                fitting.append(subject)
        for group in within(room_for_weights(self.device), fitting, lambda subject: subject.num_bytes):
            rows += self._run_on_device(context, group)
        return rows

    def _run_on_device(self, context: Context, subjects: Sequence[LoadedSae]) -> list[Row]:
        """SAEs that have room on the device together; they leave it in the end."""
        try:
            for subject in subjects:
                subject.to(self.device)
            return run_evals(context, subjects, self.configs, self.keep)
        finally:
            for subject in subjects:
                subject.to(torch.device("cpu"))

    def _refused(self, subject: LoadedSae, error: Exception) -> list[Row]:
        return [Row(subject, eval_id, "failed", str(error)) for eval_id in self.configs]


def open_store(url: str | None, subjects: Sequence[LoadedSae]) -> Store | None:
    """The store of these SAEs, if they have one."""
    if url is None:
        return None
    try:
        return Store.open(url)
    except StoreMissing as error:
        raise StoreGone(
            f"the store of {subjects[0].name} was at {url}, and there is none now. "
            "Give its new place by --cache, or harvest it again"
        ) from error


def require_fit(subject: LoadedSae, store: Store | None) -> None:
    """The store is the one that the SAE was trained on, as far as the SAE knows, and has its width."""
    if store is None:
        return
    manifest = store.manifest
    if subject.cache_id is not None and subject.cache_id != manifest.cache_id:
        raise CacheIdMismatch(
            f"{subject.name} was trained on the store with cache id {subject.cache_id}, "
            f"found {manifest.cache_id} at {store.url}. Give the place of its own store by --cache"
        )
    expected = manifest.model.d_model * len(subject.layers)
    if subject.d_in != expected:
        raise WidthMismatch(
            f"{subject.name} reads activations of width {subject.d_in}, but {len(subject.layers)} layers of "
            f"{store.url} ({manifest.model.id}) have {expected}: it belongs to another model"
        )
