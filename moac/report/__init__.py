"""`report.html`: one page that tells a package to somebody who did not compile it."""

from moac.report.page import REPORT, render_report, write_report
from moac.report.quality import read_evaluation

__all__ = ["REPORT", "read_evaluation", "render_report", "write_report"]
