"""Everything that can be wrong with a store, drawn as one tree.

    StoreError
    ├── AddressInvalid      (ValueError)         an address that nothing installed here can open
    ├── StoreMissing        (FileNotFoundError)  no store at this address
    ├── StoreMismatch       (ValueError)         a store with other settings exists, or another was expected
    ├── StoreBusy           (BlockingIOError)    another writer holds what is wanted
    ├── StoreUnfinished     (LookupError)        a shard or split that was asked for is not there (yet)
    ├── StoreFull           (OSError)            the disk cannot hold what is to be written
    ├── StoreUnreachable    (OSError)            the disk, or the object store, fails or does not answer
    ├── ManifestInvalid     (ValueError)         metadata that do not say what FORMAT.md says
    │   └── FormatTooNew                         written by a later saemill
    ├── RequestInvalid      (ValueError)         the store does not hold what was asked for
    ├── ShardInvalid        (ValueError)         arrays handed to the writer that do not fit the manifest
    ├── ShardCorrupt        (ValueError)         bytes that are not the bytes that were committed
    │   ├── ChunkMissing                         a committed chunk is not there
    │   └── CsrInvalid                           attention rows that are not a CSR matrix
    └── ImportInvalid       (ValueError)         somebody else's activations that cannot become a store

A message says what was expected, what was found and what to do next.
"""


class StoreError(Exception):
    """Root of the tree: catch this to catch all that a store can raise on purpose."""


class AddressInvalid(StoreError, ValueError):
    """The address names a kind of storage that is unknown, or whose library is not installed."""


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
