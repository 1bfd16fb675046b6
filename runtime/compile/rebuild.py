"""The command that builds compiled engines anew."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from latentforge.runtime.manifest import Manifest

__all__ = ["rebuild_hint"]


def rebuild_hint(manifest: Manifest, directory: Path) -> str:
    """The command that builds compiled engines for the device that is here, to end a message."""
    stage = manifest.history[-1] if manifest.history else None
    if stage is None or "backends" not in stage.options:
        return ""
    options = stage.options
    sizes = [f"--{key} {options[key]}" for key in ("height", "width", "batch") if key in options]
    given = [f"--option {key}={quote(str(value))}" for key, value in options["options"].items()]
    words = [*_first_words(manifest, options, quote(str(directory))), *sizes, *given, "--overwrite"]
    return f"; build it for this machine: {' '.join(words)}"


def _first_words(manifest: Manifest, options: Mapping[str, Any], directory: str) -> Iterator[str]:
    """The command as far as sources, targets and backends go."""
    if "source" not in options:
        recipe = next((s.options["recipe"] for s in manifest.history if "recipe" in s.options), "")
        yield f"latentforge build {quote(manifest.source.checkpoint)} {directory}"
        yield f"--target {options['target']}"
        yield from (f"--recipe {quote(name)}" for name in [recipe] if name)
        return
    yield f"latentforge compile {quote(options['source'])} {directory}"
    usual = Counter(options["backends"].values()).most_common(1)[0][0]
    yield f"--backend {usual}"
    others = {n: b for n, b in options["backends"].items() if b != usual}
    yield from (f"--backend {name}={backend}" for name, backend in others.items())
