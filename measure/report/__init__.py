"""HTML report of measurements, one self-contained page: ``page.render`` and its parts.

tables.py and the chart modules arrange the data that the templates (``*.j2``) put into HTML and
SVG. The page loads no resources and runs no scripts.
"""

from latentforge.measure.report.page import render

__all__ = ["render"]
