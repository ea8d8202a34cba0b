"""The Triton form of each kernel family: the only modules that import triton.

The families' own modules load these on their first call with CUDA tensors, so that a CPU user needs no triton and
pays nothing for it. Under TRITON_INTERPRET=1 (set before the import) they take CPU tensors: the tests do that.
"""
