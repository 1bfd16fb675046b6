"""The command line's commands, a module each; ``add`` puts it into the parser.

What a command works with is imported when it is called, so that help needs none of it.
"""

__all__ = ["COMMANDS"]

COMMANDS = (
    "build",
    "export",
    "optimize",
    "compile",
    "run",
    "bench",
    "eval",
    "report",
    "compare",
    "inspect",
    "verify",
    "demo",
)
"""Their modules' names, in the order of help."""
