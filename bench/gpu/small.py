"""The whole path at a small size on one device: harvest, verify, train every variant, evaluate; compared with the CPU.

One process imports everything once; each job is a fork of it with its own time limit, so that a job that fails, hangs
or breaks the device's context is reported and the next one starts. Nothing here touches CUDA before a fork; if a fork
has no CUDA all the same (because some import asked for the device), each job is a new process instead. Independent jobs
run several at a time: a small run is mostly start-up, and none is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import keep, tell

ON_BOTH = ("topk", "batchtopk", "jumprelu", "temporal")  # trained on the CPU too
EVALUATED = ("topk", "batchtopk", "jumprelu", "hierarchical")
METRICS = (  # of core, on which the device and the CPU must agree
    "sparsity.l0",
    "saemill_metrics.explained_variance",
    "model_performance_preservation.ce_loss_score",
    "model_behavior_preservation.kl_div_score",
)
FAR = 0.02  # relative difference at which they disagree: passes are in bfloat16, sums in another order
AT_ONCE = min(6, max(1, (os.cpu_count() or 1) // 2))
LAST_LINES = 14  # shown of a failed job
children: set[int] = set()


def stop_children(*_: object) -> None:
    for child in children:
        os.killpg(child, signal.SIGKILL)
    sys.exit(143)


@dataclass(frozen=True)
class Job:
    """Something to do, with a limit in seconds and a note to report once it is done."""

    name: str
    limit: float
    do: Callable[[], object]
    note: Callable[[], str] | None = None  # by default, the last line of output


class Jobs:
    """Runs jobs and keeps the results."""

    def __init__(self, logs: Path, deadline: float, only: str | None) -> None:
        self.logs, self.deadline, self.only, self.spawns = logs, deadline, only, False
        self.failed: list[str] = []
        self.done = 0
        logs.mkdir(exist_ok=True)

    def run(self, *jobs: Job) -> bool:
        """Run jobs in parallel; return whether all of them succeeded."""
        if self.only is not None:  # this process runs one job, and skips the others silently
            for job in jobs:
                if job.name == self.only:
                    job.do()
                    sys.exit(0)
            return True
        waiting, running, all_ok = list(jobs), {}, True
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                job, start = waiting.pop(0), time.monotonic()
                limit = min(job.limit, self.deadline - start)
                if limit < 3:
                    all_ok = self.keep(job.name, "skipped", 0.0, "no time left")
                else:
                    running[self._begin(job)] = job, start, start + limit
            for child, (job, start, until) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if not done and time.monotonic() < until:
                    continue
                if not done:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                children.discard(child)
                del running[child]
                all_ok &= self._end(job, time.monotonic() - start, status if done else None)
            time.sleep(0.02)
        return all_ok

    def _begin(self, job: Job) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # library threads are idle here
            child = os.fork()
        if child == 0:
            self._in_child(job)
        children.add(child)
        return child

    def _end(self, job: Job, seconds: float, status: int | None) -> bool:
        """Report a job; a status of None means that it was killed for its time."""
        if status != 0:
            verdict = "TIMEOUT" if status is None else f"FAILED {os.waitstatus_to_exitcode(status)}"
            self.keep(job.name, verdict, seconds, self.last_lines(job.name)[-1])
            print("\n".join(f"    | {line}" for line in self.last_lines(job.name)), flush=True)
            return False
        try:
            note = self.last_lines(job.name)[-1] if job.note is None else job.note()
        except Exception as error:  # noqa: BLE001  # a failed note is not a failed job
            note = f"({type(error).__name__}: {error})"
        return self.keep(job.name, "ok", seconds, note)

    def _in_child(self, job: Job) -> None:
        """Run the job and exit; never returns."""
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(self._log(job.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w", 1)
        if self.spawns:
            os.execv(sys.executable, [sys.executable, *sys.argv, "--job", job.name])
        code = 0
        try:
            job.do()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:  # noqa: BLE001  # a fork must not continue its parent's work
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    def _log(self, name: str) -> Path:
        return self.logs / f"{name.replace(' ', '_')}.log"

    def last_lines(self, name: str) -> list[str]:
        """The last lines of a job's output."""
        written = self._log(name).read_text(errors="replace") if self._log(name).exists() else ""
        lines = [line.strip()[:200] for line in written.splitlines() if line.strip()]
        return lines[-LAST_LINES:] or [""]

    def keep(self, name: str, status: str, seconds: float, note: str) -> bool:
        keep({"what": f"whole path, small: {name}", "who": status, "seconds": round(seconds, 2), "note": note})
        tell(f"{name:<22} {status:<10} {seconds:6.1f} s  {note}")
        self.done += status == "ok"
        if status != "ok":
            self.failed.append(name)
        return status == "ok"


def call(main: Callable[..., object], *words: object) -> Callable[[], object]:
    """A call of a click command in this process."""
    return lambda: main([str(word) for word in words], standalone_mode=False)


def result_of(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "result.json").read_text())


def describe(runs: Path, name: str) -> str:
    result = result_of(runs, name)
    sae = next(iter(result["saes"].values()))
    return (
        f"EV {sae['explained_variance']:.4f} L0 {sae['l0']:.1f} loss {sae['loss'] or 0:.5f}, "
        f"{result['tokens_per_second']:,.0f} tok/s, waiting {result['waiting_share']:.1%}"
    )


def compare_runs(device: Path, cpu: Path, name: str) -> str:
    found, expected = (next(iter(result_of(runs, name)["saes"].values())) for runs in (device, cpu))
    parts = [f"{key} {found[key]:.5f} / {expected[key]:.5f}" for key in ("explained_variance", "l0", "loss")]
    return "device / cpu: " + ", ".join(parts)


def core_of(runs: Path, name: str) -> dict[str, float]:
    """The metrics of one run's SAE that are compared; an SAE that reads attention has few of them."""
    document = json.loads(next((runs / name).rglob("*_eval_results.json")).read_text())
    groups = document | document["eval_result_metrics"]
    values = {metric: (groups.get(group) or {}).get(key) for metric in METRICS for group, key in [metric.split(".")]}
    return {metric: value for metric, value in values.items() if value is not None}


def compare_core(device: Path, cpu: Path, names: list[str]) -> None:
    """Fail if a number of the evaluation on the device is far from the CPU's."""
    worst = 0.0
    for name in names:
        here, there = core_of(device, name), core_of(cpu, name)
        assert here and here.keys() == there.keys(), f"{name}: {sorted(here)} here, {sorted(there)} there"
        for metric in here:
            apart = abs(here[metric] - there[metric]) / max(1.0, abs(there[metric]))
            worst = max(worst, apart)
            print(f"{name} {metric}: {here[metric]:.6f} / {there[metric]:.6f}")
    print(f"{len(names)} SAEs, up to {len(METRICS)} metrics each: at most {worst:.1e} apart")
    sys.exit(not worst < FAR)


def compare_stores(device: Path, cpu: Path, layer: int) -> None:
    """Fail unless residuals agree in relative norm, and attention in the share of entries that both keep."""
    import numpy as np

    from saemill.cache_schema import Request, Store, to_float32

    with Store.open(device) as one, Store.open(cpu) as two:
        attention = one.manifest.attention.layers
        request = Request(layers=(layer,), attention_layers=attention, tokens=True)
        worst, kept, mass = 0.0, 1.0, 0.0
        for span in one.spans(request):
            a, b = one.read(request, span), two.read(request, span)
            assert np.array_equal(a.tokens, b.tokens), "the tokens differ"
            x, y = (to_float32(value.resid[layer], one.manifest.model.dtype).astype(np.float64) for value in (a, b))
            assert np.isfinite(x).all(), "residuals on the device are not finite"
            worst = max(worst, float(np.linalg.norm(x - y) / np.linalg.norm(y)))
            for at in attention:
                p, q = (value.attention[at].dense().astype(np.float64) for value in (a, b))
                kept = min(kept, float(((p > 0) & (q > 0)).sum() / max(1, ((p > 0) | (q > 0)).sum())))
                mass = max(mass, float(np.abs(p.sum(-1) - q.sum(-1)).mean()))
    print(f"residuals differ by {worst:.2e} of their norm; {kept:.4%} of entries kept by both; mass by {mass:.1e}")
    sys.exit(not (worst < 1e-3 and kept > 0.99))


def evaluate_on_both(jobs: Jobs, sae_eval: Any, runs: Path, work: Path, device: str, small: bool) -> None:
    """Evaluate the same SAEs on the same rows, without sharing the clean pass between the devices."""
    names = [name for name in EVALUATED[: 1 if small else None] if (runs / name / "result.json").exists()]
    if not names and jobs.only is None:
        return
    copies, evaluations = work / "runs_evaluated_on_cpu", work / "store.evals"
    words: list[object] = ["--evals", "core", "--no-plots", "--set", "core.resamples=10"]
    if small:
        words += ["--set", "core.n_eval_reconstruction_batches=1"]
        words += ["--set", "core.n_eval_sparsity_variance_batches=1"]

    def on_cpu() -> object:
        shutil.copytree(runs, copies, dirs_exist_ok=True)
        for old in copies.rglob("*_eval_results.json"):
            old.unlink()
        shutil.rmtree(evaluations, ignore_errors=True)
        return call(sae_eval, *names, "--runs", copies, "--device", "cpu", *words)()

    here = jobs.run(Job("core evaluation", 60, call(sae_eval, *names, "--runs", runs, "--device", device, *words)))
    there = jobs.run(Job("core on the cpu", 60, on_cpu))
    if here and there:
        jobs.run(Job("evaluations agree", 30, lambda: compare_core(runs, copies, names)))


def harvest_on_both(jobs: Jobs, sae_harvest: Any, work: Path, device: str, small: bool) -> None:
    """Harvest in float32, in which the two devices differ only in the order of summation."""
    words = ["--model", "pocket", "--layer", 19, "--tokens", "8k" if small else "16k", "--dtype", "float32"]
    places = {device: work / "exact_device", "cpu": work / "exact_cpu"}
    if device == "cpu":
        places = {"cpu": work / "exact_cpu", "auto": work / "exact_device"}
    made = [
        Job(f"harvest float32 {at}", 60, call(sae_harvest, *words, "--device", at, "--out", out))
        for at, out in places.items()
    ]
    if jobs.run(*made):
        compare = lambda: compare_stores(work / "exact_device", work / "exact_cpu", 19)  # noqa: E731
        jobs.run(Job("harvests agree", 30, compare))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=170)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--spawn", action="store_true", help="Start each job as a new process, without trying forks.")
    parser.add_argument("--job", help="Internal.")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop_children)
    start = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = Jobs(args.work / "jobs", start + args.limit, args.job)
    device, work, small = args.device, args.work, args.small
    tokens, batch, width = ("40k", 4096, 128) if small else ("200k", 2048, 1024)
    store, runs, by_cpu = work / "store", work / "runs", work / "runs_cpu"

    import torch

    from saemill.cache_schema.cli import main as sae_store
    from saemill.evaluate.cli import main as sae_eval
    from saemill.evaluate.run import command  # noqa: F401  # imported late by the commands
    from saemill.harvest import run as harvest_run  # noqa: F401
    from saemill.harvest.cli import main as sae_harvest
    from saemill.train.cli import main as sae_train
    from saemill.train.kit import variant_registry

    first = list(dict.fromkeys((*ON_BOTH, *EVALUATED)))
    others = [name for name in sorted(variant_registry.names()) if name not in first]
    for name in variant_registry.names():
        variant_registry.module(name)
    if args.job is None:
        jobs.keep("imports", "ok", time.monotonic() - start, f"torch {torch.__version__}")
        on_device = Job("device in a fork", 40, lambda: print(torch.zeros(1, device=device).add(1)))
        jobs.spawns = args.spawn or not jobs.run(on_device)

    def train(name: str, where: str, out: Path) -> Callable[[], object]:
        words = ["--variant", name, "--cache", store, "--out", out, "--name", name, "--width", width]
        words += ["--epochs", 1, "--set", f"data.batch_tokens={batch}", "--device", where, "--no-plots"]
        return call(sae_train, *words)

    def train_on_cpu(name: str) -> object:
        torch.set_num_threads(2)  # several run at a time
        return train(name, "cpu", by_cpu)()

    def trained(names: list[str]) -> list[Job]:
        return [
            Job(f"train {name}", 40, train(name, device, runs), lambda name=name: describe(runs, name))
            for name in names
        ]

    words = ["--model", "pocket", "--layer", 19, "--resid-layers", "-2..+1", "--tokens", tokens, "--device", device]
    note = lambda: f"{tokens} tokens of the pocket model, bfloat16"  # noqa: E731
    if jobs.run(Job("harvest", 90, call(sae_harvest, *words, "--out", store), note)):
        jobs.run(Job("verify", 30, call(sae_store, "verify", store)), *trained(first))
        evaluate_on_both(jobs, sae_eval, runs, work, device, small)
        jobs.run(*trained(others))
    harvest_on_both(jobs, sae_harvest, work, device, small)
    jobs.run(
        *(
            Job(
                f"{name} on the cpu",
                40,
                lambda name=name: train_on_cpu(name),
                lambda name=name: compare_runs(runs, by_cpu, name),
            )
            for name in ON_BOTH[: 1 if small else None]
            if args.job is not None or (runs / name / "result.json").exists()
        )
    )
    tell(
        f"{jobs.done} of {jobs.done + len(jobs.failed)} jobs ok"
        + f"; not: {', '.join(jobs.failed)}" * bool(jobs.failed)
    )
    sys.exit(bool(jobs.failed))


if __name__ == "__main__":
    main()
