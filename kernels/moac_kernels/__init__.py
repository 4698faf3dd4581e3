"""Attention kernels and the oracle they are held against. Imports torch alone."""
