"""What can go wrong in a harvest, one class per condition."""

from huggingface_hub.errors import StrictDataclassError

# What transformers raises over files whose fields make no model and no tokenizer.
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
    """Any condition that ends a harvest with one clear message."""


class ModelUnavailable(HarvestError, OSError):
    """The weights are neither in a folder, nor in the local cache, nor on the hub."""


class WeightsIncomplete(HarvestError, ValueError):
    """A checkpoint lacks weights of the layers that were asked for."""


class UnsupportedArchitecture(HarvestError, ValueError):
    """No entry in the architecture table for this model type."""


class LayerOutOfRange(HarvestError, ValueError):
    """A residual or attention layer that the model does not have."""


class HookMissing(HarvestError, ValueError):
    """The model's family has no such hook, or nobody has said where."""


class ContextTooLong(HarvestError, ValueError):
    """Windows longer than the model was made for, or than positions can be written down."""


class NonFiniteResidual(HarvestError, ArithmeticError):
    """A residual stream holds infinities or NaN."""


class NonFiniteAttention(HarvestError, ArithmeticError):
    """A row of attention probabilities has no positive, finite mass."""


class SettingInvalid(HarvestError, ValueError):
    """An option that cannot be read, or that contradicts another."""


class SourceInvalid(HarvestError, TypeError):
    """A corpus source's file does not define what `corpus/source.py` asks for."""


class CorpusUnavailable(HarvestError, LookupError):
    """The file, data set, split or column that was named is not there, or cannot be read."""


class CorpusEmpty(HarvestError, ValueError):
    """The corpus holds no text at all."""


class SplitEmpty(HarvestError, ValueError):
    """The corpus is too small to fill one window of each split."""


class DocumentInvalid(HarvestError, ValueError):
    """A document that is not UTF-8 text."""


class NetworkLost(HarvestError, ConnectionError):
    """The connection was lost too often in a row; what was read is kept."""


class TokenizerUnsuitable(HarvestError, ValueError):
    """A tokenizer that cannot make windows: without BOS or a fast implementation, or whose rules are not known."""


class TokensMissing(HarvestError, TimeoutError):
    """The worker that tokenises for all others did not write the tokens in time."""


class ModelDiffers(HarvestError, ValueError):
    """The model at hand is not the one that the store was begun with."""


class DeviceFull(HarvestError, MemoryError):
    """The device has no memory left for the model, or for a batch of windows."""


def name_window(window: int, first: int | None) -> str:
    """For a person: of the store, or of the batch where no store is made."""
    return f"window {window} of the batch" if first is None else f"window {first + window} of the store"


def say_overflow(dtype: str) -> str:
    """What to do where a model's numbers are none."""
    if dtype == "float32":
        return "the model itself gives them in float32: look at its weights"
    wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    return f"the model overflows in {dtype}, harvest with --dtype {wider} into another --out"
