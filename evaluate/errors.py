"""Everything that an evaluation can refuse, by name."""

from __future__ import annotations


class EvalError(Exception):
    """Base of every error that an evaluation raises on purpose."""


class SettingInvalid(EvalError, ValueError):
    """An option or a setting that cannot be read, or that no evaluation has."""


class UnknownEval(EvalError, LookupError):
    """An evaluation was asked for that has no file in the folder of evaluations."""


class EvaluationInvalid(EvalError, TypeError):
    """An evaluation's file does not define what `evals/evaluation_contract.py` asks for."""


class TargetUnknown(EvalError, FileNotFoundError):
    """There is no run, and no folder of an SAE, of the name that was given."""


class RunUnfinished(EvalError, ValueError):
    """A run has not ended, or has saved no SAE."""


class StoreGone(EvalError, FileNotFoundError):
    """The store that an SAE was trained on is not where it was."""


class CacheIdMismatch(EvalError, ValueError):
    """The store is not the one that the SAE was trained on."""


class WidthMismatch(EvalError, ValueError):
    """An SAE reads activations of another width than the store or the model has."""


class ResultInvalid(EvalError, ValueError):
    """A file of results is damaged, or is not one."""


class ResultFromLater(EvalError, ValueError):
    """A later saemill wrote a file of results: whole, and not to be taken for a damaged one."""


class Incomparable(EvalError, ValueError):
    """Results of different stores or settings cannot be in one table."""


class MemoryTooSmall(EvalError, MemoryError):
    """Even the smallest piece of a batch does not fit into memory."""


class BrowserUnwritten(EvalError, OSError):
    """The disk has no room for a latent browser, or refuses to take it."""


class NotRun(EvalError):
    """Something that an evaluation needs is not there. It is reported as not run; the others go on."""


class ModelMissing(NotRun, FileNotFoundError):
    """The language model is neither on this machine nor reachable, or it is a different one."""


class DataMissing(NotRun, FileNotFoundError):
    """A data set is neither on this machine nor reachable: the message says what to accept or download."""


class NotApplicable(NotRun, TypeError):
    """The question makes no sense for this SAE, or for this store."""
