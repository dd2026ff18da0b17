"""The errors of a harvest, one class per condition."""

from huggingface_hub.errors import StrictDataclassError

# Raised by transformers on files that do not describe a model or a tokenizer.
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
    """A checkpoint lacks weights of the requested layers."""


class UnsupportedArchitecture(HarvestError, ValueError):
    """No entry in the architecture table for this model type."""


class LayerOutOfRange(HarvestError, ValueError):
    """The model does not have a requested layer."""


class HookMissing(HarvestError, ValueError):
    """The model's family has no such hook, or `architectures` does not list it."""


class ContextTooLong(HarvestError, ValueError):
    """Windows are longer than the model or stored positions allow."""


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
    """The corpus holds no text."""


class SplitEmpty(HarvestError, ValueError):
    """The corpus is too small to fill one window of each split."""


class DocumentInvalid(HarvestError, ValueError):
    """A document is not UTF-8 text."""


class NetworkLost(HarvestError, ConnectionError):
    """The connection was lost too many times in a row; all text read so far is kept."""


class TokenizerUnsuitable(HarvestError, ValueError):
    """The tokenizer cannot make windows: it has no BOS or no fast implementation, or its rules are unknown."""


class TokensMissing(HarvestError, TimeoutError):
    """The first worker, which tokenises for all, did not write the tokens in time."""


class ModelDiffers(HarvestError, ValueError):
    """The model found is not the one that the store was harvested with."""


class DeviceFull(HarvestError, MemoryError):
    """The device has no memory left for the model or a batch of windows."""


def name_window(window: int, first: int | None) -> str:
    """A window's name in messages: its number in the store, or in the batch if there is no store."""
    return f"window {window} of the batch" if first is None else f"window {first + window} of the store"


def say_overflow(dtype: str) -> str:
    """The remedy, in words, for a model's infinities and NaN."""
    if dtype == "float32":
        return "the model computes them even in float32: check its weights"
    wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    return f"the model overflows in {dtype}: harvest with --dtype {wider} into another --out"
