"""Reports: a record as one self-contained page, or as plain text. Reads records only; needs no model and no torch."""

from mohs.reports.page import render
from mohs.reports.plain import text

__all__ = ["render", "text"]
