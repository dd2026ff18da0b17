"""For all tests: where there is no GPU, Triton's kernels run on CPU tensors, interpreted."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
