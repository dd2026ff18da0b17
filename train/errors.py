"""Everything that training can refuse, by name.

TrainError
├── ConfigInvalid (ValueError)          a setting that no run can satisfy
├── UnknownVariant (LookupError)        no file of that name in train/variants/
├── UnknownRecipe (LookupError)         no study or run of that name in train/study_recipes/
├── SideInputMissing (LookupError)      a term or a gate read what its variant did not request
├── NonFiniteLoss (ArithmeticError)     the loss is not finite; weights are as before the step
├── TrainingDiverged (ArithmeticError)  what an SAE rebuilds after its last step is not finite
├── StoppedElsewhere (RuntimeError)     another process of the run stopped with an error
├── SaeInvalid (ValueError)             a folder that does not hold an SAE this package can read
├── StateInvalid (ValueError)           a checkpoint's state does not fit this SAE
├── NothingToTrain (ValueError)         no step to take, no token to take it on, or none to measure it on
├── StoreTooShort (ValueError)          fewer tokens than the budget, and no request to read them again
├── MemoryTooSmall (MemoryError)        the run does not fit
├── ActivationsNotFinite (ArithmeticError)  the store holds values that are not finite
├── RunMissing (FileNotFoundError)      no run, or no SAE in it, of this name
├── RunTaken (FileExistsError)          the name of a new run is taken
├── RunFinished (ValueError)            nothing is left to resume
├── CheckpointDamaged (ValueError)      no checkpoint is complete
├── RunNotWritten (OSError)             the run's disk is full, or takes no files
├── NotPushed (OSError)                  the Hub does not take an SAE
├── TrackerMissing (ImportError)        a tracker's package is not installed
└── RunInterrupted                      a signal ended the run; its state is saved
"""

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
    """A setting is out of range, or two settings contradict each other."""


@contextmanager
def name_sae(label: str) -> Iterator[None]:
    """Of which SAE of a run a setting is refused."""
    try:
        yield
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{label}: {error}") from None


class UnknownVariant(TrainError, LookupError):
    """A variant was asked for that has no file in the folder of variants."""


class UnknownRecipe(TrainError, LookupError):
    """A recipe was asked for that no file in the folder of recipes has."""


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
    """What an SAE rebuilds of held-out text is not a finite number."""


class StoppedElsewhere(TrainError, RuntimeError):
    """Another process of the run has ended with an error."""


class SaeInvalid(TrainError, ValueError):
    """A folder does not hold an SAE in a layout this package reads."""


class StateInvalid(TrainError, ValueError):
    """Saved training state lacks tensors, or has them in other shapes."""


class NothingToTrain(TrainError, ValueError):
    """The run would have no step, or the split no token."""


class StoreTooShort(TrainError, ValueError):
    """The budget is larger than the tokens that the store has, and reading them again was not asked for."""


class MemoryTooSmall(TrainError, MemoryError):
    """The run does not fit into the memory that is free."""


class ActivationsNotFinite(TrainError, ArithmeticError):
    """Activations of the store are infinite or NaN."""


class RunMissing(TrainError, FileNotFoundError):
    """No run, or no SAE, has the name that was given."""


class RunTaken(TrainError, FileExistsError):
    """A run of this name exists already."""


class RunFinished(TrainError, ValueError):
    """A finished run was to be resumed."""


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
