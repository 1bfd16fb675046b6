"""Records that stages append to the history of a manifest."""

import importlib.metadata
import time
from collections.abc import Mapping
from typing import Any

from latentforge.runtime.manifest import Stage
from latentforge.runtime.version import __version__

__all__ = ["package_versions", "stage_record"]


def stage_record(
    name: str,
    start: float,
    options: Mapping[str, Any],
    *,
    tools: Mapping[str, str] | None = None,
    passes: Mapping[str, int] | None = None,
    measured: Mapping[str, Mapping[str, float]] | None = None,
) -> Stage:
    """Return the history entry of a stage that ends now.

    Args:
        name: of the stage, as the history lists it.
        start: time.perf_counter() when the stage began.
        options: the request, in values that JSON can hold.
        tools: versions of the libraries used, by name; latentforge's own is added.
        passes: number of rewrites by graph pass.
        measured: figures by component, or under ``image``.
    """
    return Stage(
        name=name,
        options=options,
        tools={"latentforge": __version__, **(tools or {})},
        seconds=round(time.perf_counter() - start, 1),
        passes=passes or {},
        measured=measured or {},
    )


def package_versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of Python packages, by name.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    return {package: importlib.metadata.version(package) for package in packages}
