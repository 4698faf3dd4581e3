"""`report.html`: one page that tells a package to somebody who did not compile it."""

from moac.report.page import REPORT, render_report, write_report

__all__ = ["REPORT", "render_report", "write_report"]
