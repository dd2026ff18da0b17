"""The read order: which tokens make up step s, as a pure function of sizes, seed, epoch and step.

A block is the part of the split in memory at one time: pieces from all over it, reassigned in each epoch. Its steps
take its shuffled tokens one batch after the other, or its shuffled windows spread over the same steps, so that both
kinds of variants read the same blocks at the same steps. Any step is located by arithmetic on counts; nothing before
its block is ever read. What remains of a block after its last whole batch is left out, a different part each epoch.

`SplitSizes` describes a split before training starts: counts of trainable tokens fix the order, and probabilities are
those that two tokens or windows of an ideal batch share a document (`ShuffleQuality`). Neither includes special tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...cache_schema import Span, Store
from ...cache_schema.layout import arrays_of
from ..errors import ConfigInvalid


@dataclass(frozen=True, eq=False)
class SplitSizes:
    """Everything that determines the read order of a split."""

    first_window: int
    context: int
    shard_windows: int
    chunk_windows: int  # windows in one chunk of residuals: no read is smaller
    trainable: np.ndarray  # int64 [windows of the split], tokens that are not special
    same_document: float  # probability that two of these tokens share a document
    same_first_document: float  # probability that two windows start in the same document

    @property
    def windows(self) -> int:
        return len(self.trainable)

    @property
    def tokens(self) -> int:
        return int(self.trainable.sum())


def measure_split(store: Store, split: str) -> SplitSizes:
    """Read the store's counts, or count its tokens if the store is too old to have them."""
    manifest = store.manifest
    trainable, numbers = store.counts(split)
    sites = manifest.sites
    chunk_windows = arrays_of(manifest)[sites[0].path].chunks[0] if sites else manifest.shard_windows
    return SplitSizes(
        first_window=manifest.splits[split][0],
        context=manifest.context,
        shard_windows=manifest.shard_windows,
        chunk_windows=chunk_windows,
        trainable=trainable,
        same_document=numbers.same_document,
        same_first_document=numbers.same_first_document,
    )


PIECES_PER_BLOCK = 32  # at least, if chunks allow it: a block should cover many places of the store
_PIECES, _TOKENS, _WINDOWS = range(3)  # purposes of random streams


@dataclass(frozen=True)
class BlockPlan:
    """One block of one epoch."""

    epoch: int
    index: int
    pieces: tuple[Span, ...]  # in the order of the store
    tokens: int  # trainable
    steps: int
    first_step: int  # counted over the whole run

    @property
    def windows(self) -> int:
        return sum(piece.windows for piece in self.pieces)


class Plan:
    """The read order of a run over one split."""

    def __init__(self, sizes: SplitSizes, *, batch_tokens: int, pool_tokens: int, seed: int | None) -> None:
        if pool_tokens < batch_tokens:
            raise ConfigInvalid(
                f"expected a pool of at least a batch, found pool_tokens {pool_tokens} for batch_tokens {batch_tokens}"
            )
        self.sizes = sizes
        self.batch_tokens = batch_tokens
        self.pool_tokens = pool_tokens
        self.seed = seed
        self.pieces = cut_pieces(sizes, pool_tokens)
        self.num_blocks = max(1, min(len(self.pieces), -(-sizes.windows * sizes.context // pool_tokens)))
        ends = np.concatenate([[0], np.cumsum(sizes.trainable)])
        edges = [edge - sizes.first_window for piece in self.pieces for edge in (piece.start, piece.stop)]
        self._piece_tokens = ends[edges[1::2]] - ends[edges[::2]]
        self._starts = [0]  # first step of each epoch, as far as computed
        self.blocks = lru_cache(maxsize=4)(self._make_blocks)

    def steps_in(self, epochs: int, enough: float = math.inf) -> int:
        """Steps in the first `epochs` epochs, or in the first of them that together have `enough` steps."""
        while len(self._starts) <= epochs and self._starts[-1] < enough:
            dealt = deal(len(self.pieces), self.num_blocks, self.seed, len(self._starts) - 1)
            steps = sum(int(self._piece_tokens[members].sum()) // self.batch_tokens for members in dealt)
            self._starts.append(self._starts[-1] + steps)
        return self._starts[min(epochs, len(self._starts) - 1)]

    def locate(self, step: int) -> tuple[BlockPlan, int]:
        """The block that holds a step, and the step's place in it."""
        while self._starts[-1] <= step:
            if self.steps_in(len(self._starts)) == 0:  # later epochs, each assigned differently, may have no batch
                raise ConfigInvalid(
                    f"expected at least one whole batch of {self.batch_tokens} tokens in the first epoch, "
                    f"found {self.sizes.tokens} trainable tokens in {self.num_blocks} blocks: "
                    "set a smaller batch_tokens"
                )
        epoch = bisect_right(self._starts, step) - 1
        blocks = self.blocks(epoch)
        block = blocks[bisect_right(blocks, step, key=lambda block: block.first_step) - 1]
        return block, step - block.first_step

    def after(self, block: BlockPlan) -> BlockPlan:
        return self.locate(block.first_step + block.steps)[0]

    @property
    def max_windows(self) -> int:
        """No block has more windows than this."""
        largest = sorted((piece.windows for piece in self.pieces), reverse=True)
        return sum(largest[: -(-len(self.pieces) // self.num_blocks)])

    def least_windows(self, steps: int) -> int:
        """The number of whole windows in the smallest batch of the first `steps` steps."""
        last = self.locate(steps - 1)[0].epoch
        blocks = (block for epoch in range(last + 1) for block in self.blocks(epoch) if block.first_step < steps)
        return min(block.windows // block.steps for block in blocks)

    def windows_taken(self) -> float:
        """Share of the first epoch's windows that are used when whole windows are drawn: every batch of a block has the
        same number."""
        blocks = self.blocks(0)
        taken = sum(block.windows // block.steps * block.steps for block in blocks)
        return taken / max(1, sum(block.windows for block in blocks))

    @property
    def is_one_block(self) -> bool:
        """Whether the whole split fits into the pool, so that it is read once for all epochs."""
        return self.num_blocks == 1

    def _make_blocks(self, epoch: int) -> tuple[BlockPlan, ...]:
        """The blocks of an epoch, without those that have no whole batch."""
        first_step = self.steps_in(epoch)
        blocks = []
        for index, members in enumerate(deal(len(self.pieces), self.num_blocks, self.seed, epoch)):
            tokens = int(self._piece_tokens[members].sum())
            steps = tokens // self.batch_tokens
            pieces = tuple(self.pieces[member] for member in members)
            if steps:
                blocks.append(BlockPlan(epoch, index, pieces, tokens, steps, first_step))
            first_step += steps
        return tuple(blocks)


def cut_pieces(sizes: SplitSizes, pool_tokens: int) -> list[Span]:
    """Cut the split into runs of whole chunks inside shards, small enough that a block has many of them."""
    wanted = pool_tokens // sizes.context // PIECES_PER_BLOCK
    length = min(max(wanted // sizes.chunk_windows, 1) * sizes.chunk_windows, sizes.shard_windows)
    first, last = sizes.first_window, sizes.first_window + sizes.windows
    pieces = []
    for shard in range(first // sizes.shard_windows, -(-last // sizes.shard_windows)):
        begin, end = shard * sizes.shard_windows, (shard + 1) * sizes.shard_windows
        pieces += Span(shard, max(begin, first), min(end, last)).cut(length, sizes.shard_windows)
    return pieces


def deal(num_pieces: int, num_blocks: int, seed: int | None, epoch: int) -> list[np.ndarray]:
    """Shuffle the pieces and assign them evenly to blocks; inside a block they are in the order of the store."""
    order = permutation(num_pieces, seed, epoch, 0, _PIECES)
    return [np.sort(part) for part in np.array_split(order, num_blocks) if len(part)]


def token_order(block: BlockPlan, seed: int | None) -> np.ndarray:
    """int64 [tokens]: the order in which a block's trainable tokens are drawn."""
    return permutation(block.tokens, seed, block.epoch, block.index, _TOKENS)


def window_order(block: BlockPlan, seed: int | None) -> np.ndarray:
    """int64 [windows]: the order in which a block's windows are drawn."""
    return permutation(block.windows, seed, block.epoch, block.index, _WINDOWS)


def token_slice(block: BlockPlan, at: int, batch_tokens: int) -> slice:
    """Where the `at`-th batch of a block is in its token order."""
    assert 0 <= at < block.steps
    return slice(at * batch_tokens, (at + 1) * batch_tokens)


def window_slice(block: BlockPlan, at: int) -> slice:
    """Where the `at`-th batch of a block is in its window order; all batches have the same number of windows."""
    per_step = block.windows // block.steps
    if per_step == 0:
        raise ConfigInvalid(
            f"expected at least one whole window in each batch, found "
            f"{block.windows} windows for {block.steps} steps: set batch_tokens to at least a window's tokens"
        )
    return slice(at * per_step, (at + 1) * per_step)


def share(rows: slice, rank: int, size: int) -> slice:
    """The part of a batch that one of `size` processes works on."""
    length = rows.stop - rows.start
    return slice(rows.start + length * rank // size, rows.start + length * (rank + 1) // size)


def permutation(count: int, seed: int | None, epoch: int, block: int, purpose: int) -> np.ndarray:
    """A permutation, independent for each epoch, block and purpose; without a seed, the order of the store."""
    if seed is None:
        return np.arange(count)
    return np.random.default_rng([seed, epoch, block, purpose]).permutation(count)


def count_pairs(labels: np.ndarray) -> tuple[int, int]:
    """The number of pairs with equal labels, and of all pairs."""
    counts = np.unique(labels, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1)).sum()) // 2, len(labels) * (len(labels) - 1) // 2


@dataclass(frozen=True)
class ShuffleQuality:
    """How well batches are shuffled: pairs from one document counted so far, and their ideal share.

    The ideal is a batch drawn at random from the whole split. A ratio near 1 means that the pool is as good as
    shuffling everything; at 5, two tokens of a batch share a document five times as often as ideal.
    """

    ideal: float
    same: int = 0
    pairs: int = 0

    def with_batch(self, labels: np.ndarray) -> ShuffleQuality:
        same, pairs = count_pairs(labels)
        return ShuffleQuality(self.ideal, self.same + same, self.pairs + pairs)

    @property
    def share(self) -> float:
        """The share of pairs from one document."""
        return self.same / self.pairs if self.pairs else 0.0

    @property
    def ratio(self) -> float:
        """Measured over ideal share: 1 is perfect. Also 1 if no pair could share a document and none does."""
        if self.ideal == 0.0:
            return 1.0 if self.same == 0 else float("inf")
        return self.share / self.ideal
