"""What can go wrong in a harvest, one class per condition."""

from huggingface_hub.errors import StrictDataclassError

# What transformers raises on files that do not describe a model or a tokenizer.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)


class HarvestError(Exception):
    """Base class of all conditions that end a harvest with one clear message."""


class ModelUnavailable(HarvestError, OSError):
    """The weights are neither in a folder, nor in the local cache, nor on the hub."""


class WeightsIncomplete(HarvestError, ValueError):
    """A checkpoint lacks weights of the layers that were asked for."""


class UnsupportedArchitecture(HarvestError, ValueError):
    """No entry in the architecture table for this model type."""


class LayerOutOfRange(HarvestError, ValueError):
    """The model does not have the residual or attention layer."""


class HookMissing(HarvestError, ValueError):
    """The model's family has no such hook, or its place has not been declared."""


class ContextTooLong(HarvestError, ValueError):
    """Windows are longer than the model was made for, or than stored positions allow."""


class NonFiniteResidual(HarvestError, ArithmeticError):
    """A residual stream holds infinities or NaN."""


class NonFiniteAttention(HarvestError, ArithmeticError):
    """A row of attention probabilities has no positive, finite mass."""


class SettingInvalid(HarvestError, ValueError):
    """An option cannot be parsed, or contradicts another."""


class SourceInvalid(HarvestError, TypeError):
    """A corpus source's file does not define what `corpus/source.py` requires."""


class CorpusUnavailable(HarvestError, LookupError):
    """The named file, data set, split or column does not exist or cannot be read."""


class CorpusEmpty(HarvestError, ValueError):
    """The corpus holds no text at all."""


class SplitEmpty(HarvestError, ValueError):
    """The corpus is too small to fill one window of each split."""


class DocumentInvalid(HarvestError, ValueError):
    """A document is not UTF-8 text."""


class NetworkLost(HarvestError, ConnectionError):
    """The connection was lost too many times in a row; what was read is kept."""


class TokenizerUnsuitable(HarvestError, ValueError):
    """The tokenizer cannot make windows: it has no BOS or no fast implementation, or its rules are not known."""


class TokensMissing(HarvestError, TimeoutError):
    """The worker that tokenises for all the others did not write the tokens in time."""


class ModelDiffers(HarvestError, ValueError):
    """The model found is not the one that the store was begun with."""


class DeviceFull(HarvestError, MemoryError):
    """The device has no memory left for the model or for a batch of windows."""


def name_window(window: int, first: int | None) -> str:
    """The window's name in messages: its number in the store, or in the batch if no store is made."""
    return f"window {window} of the batch" if first is None else f"window {first + window} of the store"


def say_overflow(dtype: str) -> str:
    """In words: what to do about a model's infinities and NaN."""
    if dtype == "float32":
        return "the model computes them even in float32: check its weights"
    wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    return f"the model overflows in {dtype}: harvest with --dtype {wider} into another --out"
