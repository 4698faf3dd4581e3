"""Every parser that is fuzzed, by name: `TARGETS[name](folder)` makes what its cases need."""

from __future__ import annotations

import checkpoints
import http_requests
import lines
import packages

TARGETS = {**packages.PARSERS, **checkpoints.PARSERS, **lines.PARSERS, **http_requests.PARSERS}
