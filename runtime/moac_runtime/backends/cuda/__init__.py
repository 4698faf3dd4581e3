"""The cuda backend: a package's own kernels on an NVIDIA GPU, with no compiler and no Triton.

`opening.open_cuda` makes a model of a package, whose sessions are those of `session.CudaSession`.
How each kernel is launched: kernels/moac_kernels/LAUNCH.md.
"""
