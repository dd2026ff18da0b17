"""GPU kernels, in Triton. Each is exact, uses no atomics on floats and gives the same bits every time.

Importing this package needs `triton`, which comes with CUDA builds of torch. With TRITON_INTERPRET=1 the same
kernels run on CPU tensors, so that a machine without a GPU can test them.
"""
