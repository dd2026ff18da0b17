"""What can go wrong in a harvest, one class per condition.

HarvestError
├── ModelUnavailable        the weights can be had neither from the cache nor from the hub
├── WeightsIncomplete       a checkpoint lacks weights that the wanted layers need
├── UnsupportedArchitecture a model type that this package cannot truncate
├── LayerOutOfRange         a layer that the model does not have
├── ContextTooLong          windows longer than the model, or than the attention format, allows
├── NonFiniteResidual       the model overflowed: infinities or NaN in a residual stream
└── NonFiniteAttention      the same in attention probabilities
"""


class HarvestError(Exception):
    """Any condition that ends a harvest with one clear message."""


class ModelUnavailable(HarvestError, OSError):
    """The weights can be had neither from a folder, nor from the local cache, nor from the hub."""


class WeightsIncomplete(HarvestError, ValueError):
    """A checkpoint lacks weights of the layers that were asked for."""


class UnsupportedArchitecture(HarvestError, ValueError):
    """No entry in the architecture table for this model type."""


class LayerOutOfRange(HarvestError, ValueError):
    """A residual or attention layer that the model does not have."""


class ContextTooLong(HarvestError, ValueError):
    """Windows longer than the model was made for, or than positions can be written down."""


class NonFiniteResidual(HarvestError, ArithmeticError):
    """A residual stream holds infinities or NaN."""


class NonFiniteAttention(HarvestError, ArithmeticError):
    """A row of attention probabilities has no positive, finite mass."""
