"""Every launch of the GPU's kernels compiles for a GPU, on a machine that has none.

The interpreter takes what a compiler refuses, such as two branches of unlike types. So the kernels' callers run
here on CPU tensors, in a process without the interpreter, and Triton compiles each launch as it would before it
runs, down to the processor's code: with its own types of the arguments, and with those numbers built in that it
builds in. A kernel that keeps part of its registers in memory would run, many times slower. One that multiplied a row
by its width in 32 bits would read elsewhere, in tables larger than any test's.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import contextlib
import io
import re
import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from saemill.harvest.model import triton_kernels
from saemill.train.sae.kernels.sparse_support import support_from_topk
from saemill.train.sae.kernels.triton import sparse_products, row_update, exact_top_k

SHARED = 99 * 1024  # bytes that a program of any card since 2020 may have
SPILLED = 64  # bytes of a thread that may be kept in memory for want of registers: a number or two
capability, is_long = int(sys.argv[1]), len(sys.argv) > 2
compiled = {}


class Card:
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **told):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            kernel = run(self, *args, grid=grid, warmup=True, **told)
    except Exception as error:
        raise SystemExit(f"{self.__name__} {told}: {error}\\n{error.__cause__ or ''}")
    if kernel.hash in compiled:
        return
    compiled[kernel.hash] = self.__name__
    # A row's number times its width has 64 bits; only a program's number times its block, a small constant, has 32.
    products = re.findall(r"arith\\.muli (\\S+), (\\S+) : (?:tensor<[0-9x]+x)?i32\\b", kernel.asm["ttir"])
    if wide := [product for product in products if not re.fullmatch("%c[0-9]{1,4}_i32.*", product[1])]:
        raise SystemExit(f"{self.__name__} {told}: products of 32 bits, {wide}")
    spilled = [int(size) for size in re.findall(r"(\\d+) bytes spill", said.getvalue())]
    if max(spilled, default=SPILLED + 1) > SPILLED or kernel.metadata.shared > SHARED:
        raise SystemExit(f"{self.__name__} {told}: {kernel.metadata.shared} bytes shared, {said.getvalue()}")


driver.set_active(Card())
knobs.nvidia.dump_ptxas_log = True  # which says how many registers there were too few
run, JITFunction.run = JITFunction.run, compile_only

both, low = (torch.float32, torch.bfloat16), (torch.bfloat16,)
selections = [(8, 1, both), (16384, 64, low), (20000, 64, both), (40000, 512, low)]
if is_long:
    selections += [(20000, 1, low), (1000, 64, both), (65536, 64, both), (40000, 512, both), (131072, 32, low)]
    selections += [(1 << 20, 512, both)]
for width, k, dtypes in selections:
    for dtype in dtypes:
        pre = torch.zeros(2, width, dtype=dtype)
        exact_top_k.top_latents(pre, k)
        exact_top_k.top_of_batch(pre, 2 * k)
exact_top_k.top_latents(torch.zeros(2, 20001), 64)
known = len(compiled)
for dead in (19999, 20003):  # AuxK chooses among as many latents as are dead, which changes every few steps
    exact_top_k.top_latents(torch.zeros(2, dead), 64)
if len(compiled) > known:
    raise SystemExit("another number of latents is compiled by itself")
support = support_from_topk(torch.arange(6).view(2, 3), 11)
turned, values = support.by_latent, torch.zeros(6)
for width in (2304, *((1, 5, 64, 768, 4096, 9216, 16384) if is_long else ())):
    x, W = torch.zeros(2, width), torch.zeros(11, width)
    sparse_products.bag_sum(W, support.latents, support.offsets, values)
    sparse_products.pair_dots(W, turned.latents, x, turned.rows, turned.order)
    sparse_products.segment_sum(values, support.offsets)
    moments, copy = (torch.zeros_like(W), torch.zeros_like(W)), torch.zeros_like(W, dtype=torch.bfloat16)
    lr, bias = torch.zeros(2, 4)[1], torch.zeros(2, dtype=torch.float64)
    adam = row_update.AdamStep(lr, bias, 0.9, 0.999, 1e-8, 0.0)
    entries = turned.offsets, turned.latents, turned.rows, values, x
    row_update.update_rows(W, moments, entries, adam, low=copy, unit=True)
    read = x.bfloat16()
    sparse_products.pair_dots(W, turned.latents, read, turned.rows, turned.order)
    row_update.update_rows(W, moments, (*entries[:4], read), adam, low=copy)
    row_update.update_rows(W, moments, (*entries[:4], read), adam, unit=True)
    row_update.update_rows(W, moments, entries, adam, dense=torch.zeros_like(W), low=copy, unit=width == 2304)
for dtype in (torch.bfloat16, torch.float16) if is_long else (torch.bfloat16,):
    for width in (2304, *((128, 256, 4096, 16384) if is_long else ())):
        for from_one in (False, True):
            triton_kernels.norm(torch.zeros(2, width, dtype=dtype), torch.zeros(width, dtype=dtype), 1e-6, from_one)
    for activation in ("silu", "gelu tanh"):
        triton_kernels.gated(torch.zeros(3, 2304, dtype=dtype), torch.zeros(3, 2304, dtype=dtype), activation)
    for context in (128, 1024, *((100, 8192, 16384) if is_long else ())):
        scores, mask = torch.zeros(2, 2, 1, context, dtype=dtype), torch.zeros(1, 1, 1, context, dtype=dtype)
        for given, softcap in ((None, None), (mask, None), (mask, 50.0)):
            triton_kernels.softmax_(scores, given, 0.0625, softcap)
print(len(compiled), sorted(set(compiled.values())))
"""


@pytest.mark.parametrize(
    "words", [["90"], *(pytest.param([card, "long"], marks=pytest.mark.slow) for card in ("80", "89", "90"))]
)
def test_every_launch_compiles_for_a_gpu(tmp_path, monkeypatch, words):
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count = int(done.stdout.split()[0])
    assert count > 40
    assert all(name in done.stdout for name in ("_update", "_top_of_row", "_norm", "_gated", "_softmax"))
