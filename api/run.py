"""A trained run: its results as rows, its SAEs to load."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

from ..train.disk.atomic_files import read_json
from ..train.errors import RunMissing
from ..train.run.find_and_load_sae import load_sae
from ..train.run.run_folder import is_run, own_path
from ..train.sae.model import SparseAutoencoder
from . import notebook_html


class Run:
    """A run that has ended. Wherever a run is asked for, it stands for its folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = own_path(path)
        if is_run(self.path) and not (self.path / "result.json").exists():
            raise RunMissing(f"{path} has not ended: go on with train(resume={str(self.path)!r})")
        self.results = read_json(self.path / "result.json")
        """All of result.json."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def saes(self) -> tuple[str, ...]:
        """The labels of its SAEs."""
        return tuple(self.results["saes"])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One for each SAE; `pandas.DataFrame(run.rows)` is a frame."""
        shown = ("variant", "width", "l0", "explained_variance", "dead_share", "loss")
        return [{"sae": label, **{k: sae[k] for k in shown}} for label, sae in self.results["saes"].items()]

    def load(self, which: int | str = 0) -> SparseAutoencoder:
        """An SAE, by its label or its number."""
        try:
            label = self.saes[which] if isinstance(which, int) else which
        except IndexError:
            label = str(which)
        if label not in self.saes:
            raise RunMissing(f"{self.path} has no SAE {which!r}: choose one of {', '.join(self.saes)}, or by number")
        return load_sae(self.path / label)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        saes = "; ".join(f"{r['sae']}: L0 {r['l0']:.1f}, EV {number(r['explained_variance'])}" for r in self.rows)
        said = "; ".join(filter(None, [saes, *self._diverged]))
        return f"Run({str(self.path)!r}): {self.results['steps']:,} steps; {said}"

    def _repr_html_(self) -> str:
        done = f"{self.results['steps']:,} steps, {self.results['tokens']:,} tokens"
        return notebook_html.table(self.rows, str(self.path), [done, *self._diverged])

    @property
    def _diverged(self) -> list[str]:
        """SAEs of the run that have no numbers, and why."""
        return [f"{label}: {why}" for label, why in self.results.get("diverged", {}).items()]
