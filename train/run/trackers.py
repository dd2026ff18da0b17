"""Further logs through accelerate's trackers (wandb, tensorboard and others); none is loaded unless asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...cache_schema.strict_json import flatten
from ..errors import ConfigInvalid, TrackerMissing


class Trackers:
    """The trackers of a run; with no names it does nothing."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._trackers = [_open(name, folder) for name in names]
        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in flatten(config).items()}
        for tracker in self._trackers:
            tracker.store_init_configuration(plain)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse what is unknown or not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigInvalid(f"expected trackers among {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, found {name!r}")
        if name not in available:
            raise TrackerMissing(
                f"the tracker {name} is not installed: pip install saemill[{name}], or pip install {name}"
            )


def _open(name: str, folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder / "trackers")} if kind.requires_logging_directory else {}
    try:
        tracker = kind(folder.name, **place)
        tracker.start()
    except Exception as error:  # of another package, which raises what it likes
        reason = str(error).strip().partition("\n")[0]
        raise TrackerMissing(f"the tracker {name} could not be started: {reason}") from error
    return tracker
