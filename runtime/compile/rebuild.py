"""Command line that rebuilds compiled engines."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from latentforge.runtime.manifest import Manifest

__all__ = ["rebuild_hint"]


def rebuild_hint(manifest: Manifest, directory: Path) -> str:
    """Return the end of an error message: the command that rebuilds engines for this machine.

    Returns:
        An empty string if the engines were not compiled.
    """
    stage = manifest.history[-1] if manifest.history else None
    if stage is None or "backends" not in stage.options:
        return ""
    record = stage.options
    sizes = [f"--{key} {record[key]}" for key in ("height", "width", "batch") if key in record]
    options = [f"--option {key}={quote(str(value))}" for key, value in record["options"].items()]
    command = _command(manifest, record, quote(str(directory)))
    return f"; build it for this machine: {' '.join([*command, *sizes, *options, '--overwrite'])}"


def _command(manifest: Manifest, record: Mapping[str, Any], directory: str) -> Iterator[str]:
    """Yield the command with its source, target and backends: build, or compile alone."""
    if "source" not in record:
        recipe = next((s.options["recipe"] for s in manifest.history if "recipe" in s.options), "")
        yield f"latentforge build {quote(manifest.source.checkpoint)} {directory}"
        yield f"--target {record['target']}"
        yield from (f"--recipe {quote(name)}" for name in [recipe] if name)
        return
    yield f"latentforge compile {quote(record['source'])} {directory}"
    backends = record["backends"]
    default = Counter(backends.values()).most_common(1)[0][0]
    yield f"--backend {default}"
    yield from (f"--backend {name}={own}" for name, own in backends.items() if own != default)
