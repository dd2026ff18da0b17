"""Everything that can go wrong with a store. Each message has what was expected, what was found and what to do next."""


class StoreError(Exception):
    """Base class: catch this to catch every error that a store raises on purpose."""

    def __str__(self) -> str:
        """The message alone: without the errno in classes that are also OSError."""
        return getattr(self, "strerror", None) or super().__str__()


class AddressInvalid(StoreError, ValueError):
    """The address is not a place for a store, or its kind of storage is unknown or lacks its library."""


class LaunchInvalid(StoreError, ValueError):
    """The number of launched processes cannot be read from the environment, or they cannot connect."""


class StoreMissing(StoreError, FileNotFoundError):
    """There is no store at the given address."""


class StoreMismatch(StoreError, ValueError):
    """The store at this address was made with settings other than those asked for."""


class StoreBusy(StoreError, BlockingIOError):
    """Another writer holds the claim that this one needs."""


class StoreUnfinished(StoreError, LookupError):
    """A shard has no commit record: to every reader it does not exist."""


class StoreFull(StoreError, OSError):
    """The disk is full, or too small for the coming write."""


class StoreUnreachable(StoreError, OSError):
    """The store's location answers with an error, or not at all; committed shards are not affected."""


class ManifestInvalid(StoreError, ValueError):
    """The store's metadata does not follow FORMAT.md."""


class FormatTooNew(ManifestInvalid):
    """The store, or one of its records, was written by a later version."""


class RequestInvalid(StoreError, ValueError):
    """The request names something that the store does not hold."""


class ShardInvalid(StoreError, ValueError):
    """Arrays passed to the writer do not have the shapes, types or layers of the manifest."""


class ShardCorrupt(StoreError, ValueError):
    """Stored bytes differ from the bytes that were committed."""


class ChunkMissing(ShardCorrupt):
    """A chunk of a committed shard is missing: a missing chunk is never read as zeros."""


class CsrInvalid(ShardCorrupt):
    """Attention rows break a rule of the CSR layout."""


class ImportInvalid(StoreError, ValueError):
    """The shapes, types or tokens of imported activations do not fit together."""
