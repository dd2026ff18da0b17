"""Every launch of the GPU's kernels compiles for a GPU, on a machine that has none.

The interpreter takes what a compiler refuses, such as two branches of unlike types. So the kernels' callers run
here on CPU tensors, in a process without the interpreter, and each launch is compiled for an H100 in its place.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from saemill.train.sae.kernels.support import support_from_topk
from saemill.train.sae.kernels.triton import bags, rows, select_latents

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = {"num_warps", "num_stages"}
compiled = set()


def compile_instead(self, *args, grid, warmup, **told):
    options = {name: told.pop(name) for name in OPTIONS & told.keys()}
    bound = dict(zip(self.arg_names, args)) | told
    assert bound.keys() == set(self.arg_names), (self.__name__, bound.keys())
    signature, constants = {}, {}
    for index, param in enumerate(self.params):
        value = bound[param.name]
        if param.is_constexpr:
            signature[param.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + KINDS[value.dtype]
        else:
            signature[param.name] = "i32" if isinstance(value, int) else "fp32"
    key = (self.__name__, tuple(signature.items()), tuple(constants.items()), tuple(options.items()))
    if key not in compiled:
        compiled.add(key)
        try:
            triton.compile(ASTSource(self, signature, constants, {}), target=GPUTarget("cuda", 90, 32), options=options)
        except Exception as error:
            raise SystemExit(f"{self.__name__} {signature} {constants}: {error}\\n{error.__cause__ or ''}")


JITFunction.run = compile_instead
for dtype in (torch.float32, torch.bfloat16):
    for width, k in ((8, 1), (1000, 64), (20000, 64), (40000, 512)):
        pre = torch.zeros(2, width, dtype=dtype)
        select_latents.top_latents(pre, k)
        select_latents.top_of_batch(pre, 2 * k)
support = support_from_topk(torch.arange(6).view(2, 3), 11)
turned, values = support.by_latent, torch.zeros(6)
for width in (5, 2304):
    x, W = torch.zeros(2, width), torch.zeros(11, width)
    bags.bag_sum(W, support.latents, support.offsets, values)
    bags.pair_dots(W, turned.latents, x, turned.rows, turned.order)
    bags.segment_sum(values, support.offsets)
    moments, low = (torch.zeros_like(W), torch.zeros_like(W)), torch.zeros_like(W, dtype=torch.bfloat16)
    adam = rows.AdamStep(0.1, 0.9, 0.999, 1e-8, 0.0, 1)
    entries = turned.offsets, turned.latents, turned.rows, values, x
    rows.update_rows(W, moments, entries, adam, low=low, unit=True)
    rows.update_rows(W, moments, entries, adam, dense=torch.zeros_like(W), low=low, unit=False)
    rows.update_rows(W, moments, None, adam)
names = {name for name, *_ in compiled}
print(len(compiled), sorted(names))
"""


def test_every_launch_compiles_for_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton.backends.nvidia")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count = int(done.stdout.split()[0])
    assert count > 30 and "_update" in done.stdout and "_top_of_row" in done.stdout
