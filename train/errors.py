"""Everything that training can refuse, by name."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager


def resume_command(folder: str | os.PathLike[str]) -> str:
    """The command that goes on with a run, for messages: to be pasted into a shell."""
    return shlex.join(["sae-train", "--resume", os.fspath(folder)])


class TrainError(Exception):
    """Base of every error that training raises on purpose."""


class ConfigInvalid(TrainError, ValueError):
    """A setting is out of range or names what is not there, or two settings contradict each other."""


@contextmanager
def name_sae(label: str) -> Iterator[None]:
    """Of which SAE of a run a setting is refused."""
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
            "the weights are those of the step before. "
            "Lower the learning rate, or check the activations of this batch"
        )
        self.step = step
        self.terms = terms
        self.is_input_finite = is_input_finite  # of the step's batch, where the step has looked


class TrainingDiverged(TrainError, ArithmeticError):
    """SAEs of a run diverged: all, so that it has no result, or some, of which its result says so."""


class StoppedElsewhere(TrainError, RuntimeError):
    """Another process of the run has ended with an error."""


class SaeInvalid(TrainError, ValueError):
    """A folder does not hold an SAE in a layout this package reads."""


class StateInvalid(TrainError, ValueError):
    """Saved training state lacks tensors, or has them in other shapes."""


class NothingToTrain(TrainError, ValueError):
    """The run would have no step, or has taken its last, or the split has no token."""


class MemoryTooSmall(TrainError, MemoryError):
    """The run does not fit into the memory that is free."""


class ActivationsNotFinite(TrainError, ArithmeticError):
    """Activations of the store are infinite or NaN."""


class RunMissing(TrainError, FileNotFoundError):
    """No run, or no SAE, has the name that was given."""


class RunTaken(TrainError, FileExistsError):
    """A run of this name exists already."""


class CheckpointDamaged(TrainError, ValueError):
    """No checkpoint of the run is complete, or its processes do not see the same."""


class RunNotWritten(TrainError, OSError):
    """The run's disk is full, or takes no files."""


class NotPushed(TrainError, OSError):
    """The Hub cannot be reached, or does not take an SAE; nothing was uploaded."""


class TrackerMissing(TrainError, ImportError):
    """A tracker was asked for whose package is not installed."""


class RunInterrupted(TrainError):
    """A signal ended the run; its state is saved."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
