"""The progress of a store's writers: shards committed and held, by whom, the rate and the time left.

Reads the index and newer records, as every reader does, and the claims; takes no claim.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .commits import find_committed
from .disk_and_cloud_files import open_files
from .numbers_in_words import say_time
from .open_and_check_root import read_root
from .shard_claims import find_held

LOOK_BACK_SECONDS = 300.0  # the rate is over recent shards only: workers come and go


@dataclass(frozen=True)
class Progress:
    """Progress at one moment."""

    shards: int
    committed: int
    held: dict[int, str] | None
    """Shard -> its writer; None if claims cannot be seen."""
    rate: float | None
    """Recent shards per second; None until more were committed."""

    @property
    def is_whole(self) -> bool:
        return self.committed == self.shards

    @property
    def seconds_left(self) -> float | None:
        return (self.shards - self.committed) / self.rate if self.rate else None

    def __str__(self) -> str:
        parts = [f"{self.committed:,} of {self.shards:,} shards are committed"]
        if self.is_whole:
            return f"{parts[0]}: the store is whole"
        holders = Counter((self.held or {}).values())
        parts += [f"{count} held by {who}" for who, count in sorted(holders.items())[:4]]
        if len(holders) > 4:
            parts.append(f"{sum(holders.values()):,} held by {len(holders):,} writers in all")
        if not holders:
            parts.append("who is writing is unknown" if self.held is None else "nobody is writing")
        if self.rate:
            parts.append(f"{self.rate * 60:,.1f} a minute, {say_time(self.seconds_left or 0)} left")
        return ", ".join(parts)


def follow(
    url: str,
    every: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Progress]:
    """Report progress every `every` seconds until the store is whole."""
    files = open_files(url)
    manifest = read_root(files).manifest
    seen: deque[tuple[float, int]] = deque()
    while True:
        mask = find_committed(files, manifest)
        committed = int(mask.sum())
        seen.append((clock(), committed))
        while len(seen) > 2 and seen[-1][0] - seen[1][0] > LOOK_BACK_SECONDS:
            seen.popleft()
        seconds, shards = seen[-1][0] - seen[0][0], committed - seen[0][1]
        held = find_held(files, manifest.shards)
        if held is not None:
            held = {shard: who for shard, who in held.items() if not mask[shard]}
        progress = Progress(manifest.shards, committed, held, shards / seconds if seconds and shards > 0 else None)
        yield progress
        if progress.is_whole:
            return
        sleep(every)
