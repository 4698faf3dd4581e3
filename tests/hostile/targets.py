"""Every parser that is fuzzed, by name: `TARGETS[name](folder)` makes what its cases need."""

from __future__ import annotations

import checkpoints
import lines
import packages
import serving

TARGETS = {**packages.PARSERS, **checkpoints.PARSERS, **lines.PARSERS, **serving.PARSERS}
