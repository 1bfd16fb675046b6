"""An engine directory as a participant of a benchmark, and how any participant is served.

``python -m latentforge.measure.bench.worker JOB`` answers as bench/participant.py has it.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentforge.measure.bench.protocol import BenchJob
from latentforge.runtime.image import to_array
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Result
from latentforge.runtime.process import send, take_stdout
from latentforge.runtime.settings import Settings
from latentforge.runtime.text import one_line

__all__ = ["Loaded", "main", "serve"]

Loaded = tuple[Callable[[Settings], Result], Mapping[str, Any]]
"""What makes pictures, and what is said of it when it is ready: see bench/participant.py."""


def serve(load: Callable[[BenchJob], Loaded]) -> None:
    """Load once, say so, and run once for every line on standard input.

    The program's last argument is the file of its BenchJob.
    """
    job = BenchJob.read(sys.argv[-1])
    with take_stdout() as out:
        try:
            _serve(job, load, partial(send, out))
        except Exception as error:  # whatever it is, the other side wants it in a line
            send(out, {"error": one_line(error, limit=None)})
            raise


def _serve(
    job: BenchJob, load: Callable[[BenchJob], Loaded], tell: Callable[[Mapping[str, Any]], None]
) -> None:
    run, ready = load(job)
    tell({"ready": ready})
    for _ in sys.stdin:
        result = run(job.settings)
        np.save(job.picture, to_array(result.images))
        stages = {name: list(calls) for name, calls in result.timings.stages.items()}
        tell({"total": result.timings.total, "stages": stages})


def _load_engines(job: BenchJob) -> Loaded:
    pipeline = load(Path(job.model), threads=job.threads)
    manifest = pipeline.manifest
    precisions = {manifest.components[name].precision for name in manifest.required_components}
    ready = {
        "versions": pipeline.versions(),
        "precision": ", ".join(sorted(precisions)),
        "bytes": manifest.size,
    }
    return pipeline.run, ready


def main() -> None:
    """Serve the engine directory that the job names."""
    serve(_load_engines)


if __name__ == "__main__":
    main()
