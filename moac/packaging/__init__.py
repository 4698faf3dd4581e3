"""Fused, permuted weights and the package on disk."""
