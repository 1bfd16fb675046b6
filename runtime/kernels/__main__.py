"""``python -m latentforge.runtime.kernels``: compile the kernels where they are installed."""

import sys

from latentforge.runtime.kernels.compiler import LIBRARY, build

if __name__ == "__main__":
    failure = build()
    print(f"latentforge: {failure}" if failure else LIBRARY, file=sys.stderr if failure else None)
    sys.exit(2 if failure else 0)
