"""Everything that training can refuse, by name.

TrainError
├── ConfigInvalid (ValueError)          a setting that no run can satisfy
├── UnknownVariant (LookupError)        no file of that name in train/variants/
├── SideInputMissing (LookupError)      a term or a gate read what its variant did not request
├── NonFiniteLoss (ArithmeticError)     the loss left the numbers; weights are as before the step
├── SaeInvalid (ValueError)             a folder that is no SAE this package can read
└── StateInvalid (ValueError)           a checkpoint's state does not fit this SAE
"""

from __future__ import annotations


class TrainError(Exception):
    """Base of every error that training raises on purpose."""


class ConfigInvalid(TrainError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class UnknownVariant(TrainError, LookupError):
    """A variant was asked for that has no file in the folder of variants."""


class SideInputMissing(TrainError, LookupError):
    """A side input was read that the variant's `request()` did not name."""


class NonFiniteLoss(TrainError, ArithmeticError):
    """A loss term is not a finite number; raised before the weights change."""

    def __init__(self, step: int, terms: dict[str, float]) -> None:
        listed = ", ".join(f"{name} = {value}" for name, value in terms.items())
        super().__init__(
            f"step {step}: expected finite losses, found {listed}; the weights are those of the step before. "
            "Lower the learning rate, or check the activations of this batch"
        )
        self.step = step
        self.terms = terms


class SaeInvalid(TrainError, ValueError):
    """A folder does not hold an SAE in a layout this package reads."""


class StateInvalid(TrainError, ValueError):
    """Saved training state lacks tensors, or has them in other shapes."""
