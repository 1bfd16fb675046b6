"""Participant's side of a benchmark, and the program that serves an engine directory.

As a program with the path of a job, it answers as described in bench/protocol.py.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentforge.measure.bench.protocol import BenchJob
from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.image import to_array
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Result
from latentforge.runtime.process import send, take_stdout
from latentforge.runtime.settings import Settings
from latentforge.runtime.text import one_line

__all__ = ["ServedModel", "main", "serve"]

ServedModel = tuple[Callable[[Settings], Result], Mapping[str, Any]]
"""Function that runs a request, and the content of the ``ready`` message."""


def serve(load_model: Callable[[BenchJob], ServedModel]) -> None:
    """Load the model of a job, then run its request once per line of standard input.

    The job file is the program's last argument.
    """
    job = BenchJob.read(sys.argv[-1])
    with take_stdout() as out:
        try:
            _serve(job, load_model, partial(send, out))
        except Exception as error:  # the parent expects any failure as one line
            send(out, {"error": one_line(error, limit=None)})
            raise


def _serve(
    job: BenchJob,
    load_model: Callable[[BenchJob], ServedModel],
    reply: Callable[[Mapping[str, Any]], None],
) -> None:
    run, ready = load_model(job)
    reply({"ready": ready})
    for _ in sys.stdin:
        result = run(job.settings)
        with naming_full_disk(Path(job.picture)):
            np.save(job.picture, to_array(result.images))
        stages = {name: list(calls) for name, calls in result.timings.stages.items()}
        reply({"total": result.timings.total, "stages": stages})


def _load_engines(job: BenchJob) -> ServedModel:
    pipeline = load(Path(job.model), threads=job.threads, example_images=True)
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
