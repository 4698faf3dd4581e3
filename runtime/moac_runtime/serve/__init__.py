"""A package behind an OpenAI-compatible server; needs the extra `serve`."""
