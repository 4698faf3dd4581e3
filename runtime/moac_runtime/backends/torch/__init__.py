"""Torch's own operators, on any device."""
