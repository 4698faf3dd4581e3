"""The cpu backend: native kernels of the package, no torch."""
