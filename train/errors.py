"""The errors that training raises."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager


def resume_command(folder: str | os.PathLike[str]) -> str:
    """The shell command that resumes a run, for use in messages."""
    return shlex.join(["sae-train", "--resume", os.fspath(folder)])


class TrainError(Exception):
    """Base of every error that training raises on purpose."""


class ConfigInvalid(TrainError, ValueError):
    """A setting is out of range or names something that does not exist, or two settings contradict each other."""


@contextmanager
def name_sae(label: str) -> Iterator[None]:
    """Name the SAE whose setting is refused."""
    try:
        yield
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{label}: {error}") from None


class SideInputMissing(TrainError, LookupError):
    """A side input was read that the variant's `needs()` did not name."""


class NonFiniteLoss(TrainError, ArithmeticError):
    """A loss term is not a finite number; raised before the weights change."""

    def __init__(
        self, step: int, terms: dict[str, float], place: str = "", is_input_finite: bool | None = None
    ) -> None:
        listed = ", ".join(f"{name} = {value}" for name, value in terms.items())
        super().__init__(
            f"step {step}{place and f', {place}'}: expected finite losses, found {listed}; "
            "the weights are those of the previous step. "
            "Lower the learning rate, or check the activations of this batch"
        )
        self.step = step
        self.terms = terms
        self.is_input_finite = is_input_finite  # the step's batch; None if not checked


class TrainingDiverged(TrainError, ArithmeticError):
    """SAEs of a run diverged: all of them, so there is no result, or some, which the result lists."""


class StoppedElsewhere(TrainError, RuntimeError):
    """Another process of the run failed."""


class SaeInvalid(TrainError, ValueError):
    """A folder does not hold an SAE in a layout this package reads."""


class StateInvalid(TrainError, ValueError):
    """Saved training state lacks tensors, or their shapes do not match."""


class NothingToTrain(TrainError, ValueError):
    """The run would have no steps, is already finished, or its split has no tokens."""


class MemoryTooSmall(TrainError, MemoryError):
    """The run does not fit into free memory."""


class ActivationsNotFinite(TrainError, ArithmeticError):
    """Activations of the store are infinite or NaN."""


class RunMissing(TrainError, FileNotFoundError):
    """No run or SAE has the given name, or the folder of a run is gone."""


class RunTaken(TrainError, FileExistsError):
    """A run of this name already exists."""


class CheckpointDamaged(TrainError, ValueError):
    """No checkpoint of the run is complete, or its processes see different ones."""


class RunNotWritten(TrainError, OSError):
    """The run's disk is full or cannot be written to."""


class NotPushed(TrainError, OSError):
    """The Hub cannot be reached or refuses an SAE; nothing was uploaded."""


class TrackerMissing(TrainError, ImportError):
    """The package of a requested tracker is not installed."""


class RunInterrupted(TrainError):
    """A signal ended the run; its state is saved."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
