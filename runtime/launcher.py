"""Program that starts the others: ``python launcher.py PROGRAM ARGUMENTS``.

PROGRAM is a module of latentforge, or a .py file, which then imports its neighbours. Neither the
working directory nor this file's own folder is on the module path: a json.py there is not run.
Python's own switches for that are missing in 3.10 (-P), or drop PYTHONPATH too (-I).

It runs in environments without latentforge too, and imports nothing before it has cleaned the path.
"""

import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_FOLDER))  # the folder that holds the package


def main() -> None:
    """Run the program that the first argument names, as ``__main__``."""
    unwanted = {_FOLDER, os.path.realpath(_FOLDER), os.path.realpath(os.curdir)}
    kept = {os.path.dirname(os.__file__), *_site_packages()}
    sys.path[:] = [
        entry
        for entry in sys.path
        if os.path.isabs(entry) and (entry in kept or os.path.realpath(entry) not in unwanted)
    ]
    import runpy

    sys.argv[:] = sys.argv[1:]
    program = sys.argv[0]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
        return
    _import_package()
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _site_packages() -> list[str]:
    site = sys.modules.get("site")  # missing under python -S
    return site.getsitepackages() if site is not None else []


def _import_package() -> None:
    """Import latentforge from where this file lies, even if another version is on the path."""
    sys.path.insert(0, _ROOT)
    import latentforge  # noqa: F401  imports nothing else

    del sys.path[0]
    if _ROOT not in sys.path:
        sys.path.append(_ROOT)  # last, so that it replaces no other module


if __name__ == "__main__":
    main()
