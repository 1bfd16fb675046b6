"""``python -m latentforge.runtime.kernels``: compile the kernels where they are installed.

With ``--sanitize FILE``, compile them to FILE with sanitizers, for tests: see docs/kernels.md.
"""

import argparse
import sys
from pathlib import Path

from latentforge.runtime.kernels.compiler import LIBRARY, build


def main() -> int:
    """Compile the kernels and print the library's path; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentforge.runtime.kernels", description="Compile latentforge's kernels."
    )
    parser.add_argument(
        "--sanitize", type=Path, metavar="FILE", help="compile with sanitizers to FILE, for tests"
    )
    file = parser.parse_args().sanitize
    target = LIBRARY if file is None else file
    failure = build(target, sanitize=file is not None)
    print(f"latentforge: {failure}" if failure else target, file=sys.stderr if failure else None)
    return 2 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
