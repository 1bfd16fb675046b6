"""Processes and searches that do not depend on the working directory.

A file there, such as json.py, must never be run because of its name. Imports only modules that
Python has loaded before any file of a user could take their place.
"""

import os
import sys

__all__ = [
    "child_environment",
    "leave_working_directory",
    "open_standard_streams",
    "program_command",
    "starts_with_module",
]

_LAUNCHER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launcher.py")
_SEARCHED = ("PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")
"""Variables that list folders; an empty entry stands for the working directory."""


def program_command(program: str, *arguments: str, python: str = "") -> tuple[str, ...]:
    """Return the command that runs a module of latentforge, or a .py file, through launcher.py.

    Start it with child_environment().
    """
    return (python or sys.executable, _LAUNCHER, program, *arguments)


def child_environment() -> dict[str, str]:
    """Return the environment for another process, whose searches skip the working directory."""
    return {**os.environ, **_searches(), "PYTHONSAFEPATH": "1"}


def leave_working_directory() -> None:
    """Take the working directory off the module path of a command, and of what it starts.

    Other relative entries of PYTHONPATH move behind all others: they may hold latentforge itself,
    but replace no other module.
    """
    here = os.path.realpath(os.curdir)
    relative = {
        os.path.abspath(entry)
        for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if not os.path.isabs(entry)
    }
    installed = _installed()
    absolute = map(os.path.abspath, sys.path)
    wanted = [e for e in absolute if e in installed or os.path.realpath(e) != here]
    sys.path[:] = sorted(wanted, key=lambda entry: entry in relative and entry not in installed)
    os.environ.update(child_environment())


def open_standard_streams() -> None:
    """Open the null device in place of closed standard streams.

    Another file would get their number, and what libraries print into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def starts_with_module(package: str) -> bool:
    """Return True while ``python -m`` imports a package in order to run a module of it."""
    given = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    modules = [name for flag, name in given if flag.startswith("-") and flag.endswith("m")]
    return sys.argv[:1] == ["-m"] and any(name.split(".")[0] == package for name in modules)


def _installed() -> set[str]:
    """Return the folders of the standard library and of installed packages."""
    site = sys.modules.get("site")  # missing under python -S
    packages = site.getsitepackages() if site is not None else []
    return {os.path.dirname(os.__file__), *packages}


def _searches() -> dict[str, str]:
    """Return the variables of folders that are set, without empty and relative entries."""
    return {
        name: os.pathsep.join(filter(os.path.isabs, os.environ[name].split(os.pathsep)))
        for name in _SEARCHED
        if name in os.environ
    }
