"""One contender of a benchmark, in a process of its own.

The parent writes a line to ask for a run and reads one JSON line of what it took, so that
several contenders can take turns on the same machine. ``python -m latentforge.runtime.worker
ENGINES SETTINGS THREADS`` serves an engine directory; export.eager serves the checkpoint.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentforge.runtime.bench import peak_memory
from latentforge.runtime.image import to_array
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.settings import Settings

__all__ = ["main", "serve", "settings_from_json", "settings_to_json"]


def serve(load: Callable[[int], tuple[Callable[[Settings], Result], dict[str, str]]]) -> None:
    """Load once, say so, and run once for every line on standard input.

    ``load`` takes the number of threads and gives what makes images and its libraries'
    versions. The program's arguments are the settings as JSON, the number of threads, and
    the file to leave the last image in.
    """
    settings, threads, picture = settings_from_json(sys.argv[-3]), int(sys.argv[-2]), sys.argv[-1]
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; the protocol must not see it
        run, versions = load(threads)
        _tell(out, {"versions": versions})
        for _ in sys.stdin:
            result = run(settings)
            np.save(picture, to_array(result.images))
            stages = {name: list(calls) for name, calls in result.timings.stages.items()}
            timings = {"stages": stages, "total": result.timings.total}
            _tell(out, {**timings, "peak_memory": peak_memory()})


def settings_to_json(settings: Settings) -> str:
    """One request as text."""
    return msgspec.json.encode(settings).decode()


def settings_from_json(text: str) -> Settings:
    """The inverse of settings_to_json."""
    return msgspec.json.decode(text, type=Settings)


def _tell(out: Any, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


def _load_engines(threads: int) -> tuple[Callable[[Settings], Result], dict[str, str]]:
    pipeline = Pipeline.load(Path(sys.argv[1]), threads=threads)
    return pipeline.run, pipeline.versions()


def main() -> None:
    """Serve the engine directory named by the first argument."""
    serve(_load_engines)


if __name__ == "__main__":
    main()
