"""The efforts of `moac plan` compared: their plans, what these find, and the page about it."""
