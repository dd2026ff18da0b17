"""Everything that can be wrong with a store. A message says what was expected, what was found and what to do next."""


class StoreError(Exception):
    """Root of the tree: catch this to catch all that a store can raise on purpose."""

    def __str__(self) -> str:
        """Of those that are errors of the system too the words alone, without the number."""
        return getattr(self, "strerror", None) or super().__str__()


class AddressInvalid(StoreError, ValueError):
    """The address names no place for a store, or a kind of storage that is unknown or whose library is missing."""


class LaunchInvalid(StoreError, ValueError):
    """The environment does not say how many processes were launched, or they cannot meet."""


class StoreMissing(StoreError, FileNotFoundError):
    """The address that was given holds no store."""


class StoreMismatch(StoreError, ValueError):
    """The store at this address was made with other settings than the ones asked for."""


class StoreBusy(StoreError, BlockingIOError):
    """Another writer is at work on what this one wants."""


class StoreUnfinished(StoreError, LookupError):
    """A shard has no commit record: for every reader it does not exist."""


class StoreFull(StoreError, OSError):
    """The disk is full, or too small for what is about to be written."""


class StoreUnreachable(StoreError, OSError):
    """The place where the store lies answers with an error, or not at all; what is committed is not touched by that."""


class ManifestInvalid(StoreError, ValueError):
    """The store's metadata do not say what FORMAT.md says they must."""


class FormatTooNew(ManifestInvalid):
    """The store or one of its records was written by a later version."""


class RequestInvalid(StoreError, ValueError):
    """The request names something that this store does not hold."""


class ShardInvalid(StoreError, ValueError):
    """Arrays handed to the writer do not have the shapes, types or layers of the manifest."""


class ShardCorrupt(StoreError, ValueError):
    """Stored bytes differ from the bytes that were committed."""


class ChunkMissing(ShardCorrupt):
    """A chunk of a committed shard is not on disk: absence is never read as zeros."""


class CsrInvalid(ShardCorrupt):
    """Attention rows that break a rule of the CSR layout."""


class ImportInvalid(StoreError, ValueError):
    """Activations from elsewhere whose shapes, types or tokens do not fit together."""
