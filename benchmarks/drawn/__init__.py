"""The pictures of README and docs, drawn from what was measured; `pictures.py` is the command."""
