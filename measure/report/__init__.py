"""One self-contained HTML page of what was measured: ``page.render`` and what it draws with.

words.py says figures, conclusion.py draws the conclusion, tables.py and charts.py arrange what the
templates (``*.j2``) put into HTML and SVG. The page loads nothing and runs nothing.
"""

from latentforge.measure.report.page import render

__all__ = ["render"]
