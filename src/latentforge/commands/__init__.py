"""Commands of the command line, one module each, whose ``add`` adds it to the parser.

A command imports what it works with when it runs, so that help needs none of it.
"""

__all__ = ["COMMANDS"]

COMMANDS = (
    "build",
    "search",
    "distill",
    "export",
    "optimize",
    "compile",
    "run",
    "serve",
    "bench",
    "eval",
    "report",
    "compare",
    "inspect",
    "verify",
    "demo",
)
"""Names of the modules, in the order of help."""
