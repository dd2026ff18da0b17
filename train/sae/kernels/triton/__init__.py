"""The kernels of a GPU, in Triton. Each is exact, free of atomics on floats and the same bits every time.

Importing this folder needs `triton`, which comes with CUDA builds of torch. Under TRITON_INTERPRET=1 the same
kernels run on CPU tensors, which is how a machine without a GPU tests them.
"""
