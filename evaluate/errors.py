"""Every error that an evaluation raises on purpose, by name."""

from __future__ import annotations


class EvalError(Exception):
    """Base of every error that an evaluation raises on purpose."""


class SettingInvalid(EvalError, ValueError):
    """An option or a setting that cannot be read, or that no evaluation has."""


class UnknownEval(EvalError, LookupError):
    """The requested evaluation has no file in the folder of evaluations."""


class EvaluationInvalid(EvalError, TypeError):
    """An evaluation's file does not define what `evals/evaluation_contract.py` asks for."""


class TargetUnknown(EvalError, FileNotFoundError):
    """No run and no SAE folder has the given name."""


class RunUnfinished(EvalError, ValueError):
    """A run has not finished, or has saved no SAE."""


class SaeGone(EvalError, FileNotFoundError):
    """The SAE was removed, moved or overwritten during its evaluation."""


class StoreGone(EvalError, FileNotFoundError):
    """The store that an SAE was trained on is no longer where it was."""


class CacheIdMismatch(EvalError, ValueError):
    """The store is not the one that the SAE was trained on."""


class WidthMismatch(EvalError, ValueError):
    """The width that an SAE reads is not that of the store or the model."""


class ResultInvalid(EvalError, ValueError):
    """A results file is damaged, or is not a results file."""


class ResultFromLater(EvalError, ValueError):
    """A results file was written by a later saemill: it is newer, not damaged."""


class Incomparable(EvalError, ValueError):
    """Results from different stores or settings cannot share a table."""


class MemoryTooSmall(EvalError, MemoryError):
    """Even the smallest piece of a batch does not fit into memory."""


class BrowserUnwritten(EvalError, OSError):
    """A latent browser cannot be written: the disk is full or refuses it."""


class NotRun(EvalError):
    """Something that an evaluation needs is missing. It is reported as not run; the others continue."""


class ModelMissing(NotRun, FileNotFoundError):
    """The language model is neither on this machine nor reachable, or is not the right one."""


class DataMissing(NotRun, FileNotFoundError):
    """A data set is neither on this machine nor reachable: the message says what to accept or download."""


class JudgeMissing(NotRun, ConnectionError):
    """The language model that judges explanations is not named, cannot be reached, or refuses."""


class NotApplicable(NotRun, TypeError):
    """The question makes no sense for this SAE, or for this store."""
