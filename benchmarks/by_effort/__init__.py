"""The efforts of `moac plan` compared: what is told of them, and the page about it."""
