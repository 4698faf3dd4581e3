"""`python -m moac_runtime run|serve|chat PACKAGE ...`."""

from __future__ import annotations

import sys

from moac_runtime.commands import main

raise SystemExit(main(sys.argv[1:]))
