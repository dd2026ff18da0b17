"""Training steps against the three peers at their best settings, in turns, in a new random order each round.

All are in the middle of a run: warm-up is over and thresholds are updated. If some latents are dead, auxiliary losses
are active too. bfloat16: the peers' own autocast, and our encoder's product. tf32: float32 with TF32 allowed. fused:
torch's fused Adam, which is not the peers' default. sparsify has its own autocast and matmul precision, which cannot be
turned off from outside.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import click
from racing import UNEQUAL, Contest, Entrant, make_batches
from records import record, record_failure, shares, tell

# Each at its best settings; together these fit into memory at the larger width too.
BEST = (
    "ours bfloat16",
    "ours bfloat16, no Triton",
    "sae_lens bfloat16, fused",
    "dictionary_learning bfloat16, fused",
    "sparsify",
)


@dataclass(frozen=True)
class Sizes:
    widths: tuple[int, int] = (16384, 65536)
    rows: int = 4096
    d_model: int = 2304
    k: int = 64
    steps: int = 10
    warm: int = 3

    def flops_per_token(self, width: int) -> int:
        """Pre-activations, and four sparse products: the reconstruction, the codes' gradient and the two tables'."""
        return 2 * self.d_model * (width + 4 * self.k)

    def bytes_per_step(self, width: int) -> int:
        """The unavoidable traffic: Adam's seven passes over two tables, and pre-activations written and read again."""
        return 7 * 2 * 4 * width * self.d_model + 2 * 2 * self.rows * width


SMALL = Sizes((256, 512), 128, 64, 8, 2, 1)


def entrants(compiled: bool) -> list[Entrant]:
    bfloat16, tf32 = {"precision": "bfloat16"}, {"precision": "tf32"}
    found = [Entrant("ours bfloat16", "ours", bfloat16), Entrant("ours tf32", "ours", tf32)]
    found.append(Entrant("ours float32", "ours", {"precision": "float32"}))
    found.append(Entrant("ours bfloat16, no Triton", "ours", bfloat16, {"WITHOUT_TRITON": "1"}))
    for peer in ("sae_lens", "dictionary_learning"):
        found.append(Entrant(f"{peer} bfloat16", peer, bfloat16))
        found.append(Entrant(f"{peer} bfloat16, fused", peer, bfloat16 | {"fused": True}))
        found.append(Entrant(f"{peer} tf32", peer, tf32))
    found.append(Entrant("sparsify", "sparsify", tf32))
    if compiled:
        found.append(Entrant("sae_lens bfloat16, compiled", "sae_lens", bfloat16 | {"compiled": True}))
    return found


def contests(sizes: Sizes, unequal: str) -> list[tuple[str, dict[str, Any], tuple[str, ...] | None]]:
    """Name, settings and entrants (None: all) of each contest, most important first; `unequal` is a batches folder."""
    narrow, wide = sizes.widths
    return [
        (f"topk, {narrow:,} latents", {"variant": "topk", "width": narrow}, None),
        (f"topk, {wide:,} latents", {"variant": "topk", "width": wide}, BEST),
        (f"batchtopk, {narrow:,} latents", {"variant": "batchtopk", "width": narrow}, None),
        (f"topk, {narrow:,} latents, 5 % dead", {"variant": "topk", "width": narrow, "dead": 0.05}, BEST),
        (f"batchtopk, {wide:,} latents", {"variant": "batchtopk", "width": wide}, BEST),
        (
            f"batchtopk, {narrow:,} latents, unequal rows",
            {"variant": "batchtopk", "width": narrow, "batches": unequal},
            BEST,
        ),
    ]


def run(contest: Contest, name: str, settings: dict[str, Any], who: tuple[str, ...] | None, sizes: Sizes, rounds: int):
    width, is_wide = settings["width"], settings["width"] == sizes.widths[1]
    steps, warm = (max(2, sizes.steps // 2), min(2, sizes.warm)) if is_wide else (sizes.steps, sizes.warm)
    outcome = contest.race(settings, rounds, steps, warm, who)
    for entrant, seconds in outcome.seconds.items():
        rates = [sizes.rows / value for value in seconds]
        middle = sorted(rates)[len(rates) // 2]
        moved = middle / sizes.rows * sizes.bytes_per_step(width)
        ours = shares(middle * sizes.flops_per_token(width), moved) if entrant.startswith("ours") else {}
        peak = outcome.peaks[entrant] / 1e9 or None
        record(name, entrant, "tok/s", rates, outcome.at, peak_gigabytes=peak, **ours)
    for entrant, why in outcome.failures.items():
        record_failure(name, entrant, why)


@click.command()
@click.option("--peers-python", help="Python of the peers' environment.  [default: no comparison]")
@click.option("--device", default="cuda")
@click.option("--rounds", default=5, show_default=True)
@click.option("--limit", default=200.0, show_default=True, help="Seconds; nothing is started that would take longer.")
@click.option("--compile", "compiled", is_flag=True, help="Also time SAELens with compile_sae; adds a minute.")
@click.option("--small", is_flag=True)
def main(peers_python: str | None, device: str, rounds: int, limit: float, compiled: bool, small: bool) -> None:
    sizes, until = SMALL if small else Sizes(), time.monotonic() + limit
    threads = max(1, (os.cpu_count() or 1) // 2)
    contest = Contest(entrants(compiled), peers_python, threads)
    with tempfile.TemporaryDirectory() as folder:
        shared = {"batches": make_batches(folder, sizes.rows, sizes.d_model), "k": sizes.k, "device": device}
        unequal = make_batches(f"{folder}/unequal", sizes.rows, sizes.d_model, spread=UNEQUAL)
        longest = 0.0
        for name, settings, who in contests(sizes, unequal):
            if time.monotonic() + longest > until:
                tell(f"{name}: no time left")
                continue
            start = time.monotonic()
            run(contest, name, shared | settings, who, sizes, rounds)
            longest = max(longest, time.monotonic() - start)
    contest.close()


if __name__ == "__main__":
    main()
