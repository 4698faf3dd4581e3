"""`report.html`: one page that tells a package to somebody who did not compile it."""

from moac.show.report.page import REPORT, render_report, write_report
from moac.show.report.quality import read_evaluation

__all__ = ["REPORT", "read_evaluation", "render_report", "write_report"]
