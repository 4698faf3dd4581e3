"""HiGHS as this package uses it: one thread, nothing printed."""

from __future__ import annotations

import highspy

from moac_runtime.host.streams import native_output_dropped


def new_solver() -> highspy.Highs:
    """A solver without a program.

    From 1.16 on HiGHS greets on standard output when it is made. The greeting is dropped; what
    goes wrong is told by exceptions and statuses.
    """
    with native_output_dropped():
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)  # the same plan on every machine
    return solver
