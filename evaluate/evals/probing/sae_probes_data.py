"""The binary data sets of the package `sae-probes`: prompts with one of two labels.

Its wheel carries them as compressed tables. They are read where the package is installed; none of its code
is imported, and none of its dependencies are needed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow

from ...errors import DataMissing

PACKAGE = "sae_probes"
INDEX = "probing_datasets_MASTER.csv.zst"
FOLDER = "cleaned_data"
BINARY = "Binary Classification"
INSTALL = "pip install --no-deps sae-probes"


@dataclass(frozen=True, eq=False)
class BinarySet:
    """Prompts, and 0 or 1 for each."""

    name: str
    prompts: Sequence[str]
    labels: np.ndarray  # int64


def names() -> tuple[str, ...]:
    """Every binary data set of the collection, in its own order."""
    rows = _read(data_folder() / INDEX)
    return tuple(Path(row["Dataset save name"]).name.split(".")[0] for row in rows if row["Data type"] == BINARY)


def load(name: str) -> BinarySet:
    """One data set by its numbered name."""
    rows = _read(data_folder() / FOLDER / f"{name}.csv.zst")
    return BinarySet(name, [row["prompt"] for row in rows], as_labels([row["target"] for row in rows]))


def as_labels(targets: Sequence[str]) -> np.ndarray:
    """0 for the first of the two values in their order, 1 for the other."""
    values, labels = np.unique(np.array(targets), return_inverse=True)
    if len(values) != 2:
        raise DataMissing(f"expected two labels, found {len(values)}: the data set is not a binary one")
    return labels


def revision() -> dict[str, str] | None:
    """The version of the package; None if unknown."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return {"sae-probes": importlib.metadata.version("sae-probes")}
    return None


def data_folder() -> Path:
    """Where the package keeps its data, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) / "data" for folder in (spec.submodule_search_locations or () if spec else ())]
    for folder in folders:
        if (folder / INDEX).is_file():
            return folder
    raise DataMissing(
        f"the data sets of sae-probes are not installed: `{INSTALL}` installs them. "
        "`--set sparse_probing_sae_probes.data=stdlib` probes with text of this Python instead"
    )


@lru_cache(maxsize=2)  # the index and one data set
def _read(file: Path) -> list[Mapping[str, str]]:
    csv.field_size_limit(sys.maxsize)  # prompts may be longer than the default
    try:
        with pyarrow.input_stream(str(file), compression="zstd") as stream:
            return list(csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataMissing(
            f"{file.name} of sae-probes cannot be read ({error}): install it again, `{INSTALL}`"
        ) from error
