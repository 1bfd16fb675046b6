"""Prove and measure the GPU paths in minutes: one process, time box and JSON file per stage.

    PYTHONPATH=src python benchmarks/gpu.py --output DIR --budget 480
    PYTHONPATH=src python benchmarks/gpu.py --output DIR --dry-run      # on a CPU, tiny sizes
    python benchmarks/gpu.py --plan

A stage that fails or hangs costs no other: it is ended with its children when its time is up. The
engines of full-size models are built meanwhile. DIR gets a JSON file per stage, a log and a page.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BOXES", "boxes", "main"]

ROOT = Path(__file__).parent.parent
_MARK = "LATENTFORGE_GPU_RUN"

BOXES: Mapping[str, int] = {
    "devices": 15,
    "tests": 45,
    "demo": 90,
    "full": 220,
    "others": 40,
    "xl": 70,
}
"""Seconds of each stage on a GPU, in order of worth; 480 in all. Estimates: none has run on one."""

_BUILDS = ("build-sd15", "build-deci1")  # for ``full``, beside the stages before it
_DRY_BUDGET = 1800
_SAMPLE_SECONDS = 0.5


def boxes(stages: Sequence[str], budget: float) -> dict[str, float]:
    """Return the seconds of each of these stages, in proportion to BOXES."""
    total = sum(BOXES[stage] for stage in stages)
    return {stage: BOXES[stage] * budget / total for stage in stages}


def main() -> None:
    """Run the stages and write the page."""
    options = _options()
    budget = options.budget or (_DRY_BUDGET if options.dry_run else sum(BOXES.values()))
    plan = boxes(options.stages, budget)
    if options.plan:
        print("\n".join(f"{name:<10}{seconds:5.0f} s" for name, seconds in plan.items()))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the stages too
    with tempfile.TemporaryDirectory(prefix="latentforge-gpu-") as work:
        ends = _run_all(plan, options, Path(work))
    sys.exit(_finish(ends, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of all stages")
    parser.add_argument("--stages", type=_stages, default=list(BOXES), metavar="NAME,...")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, tiny sizes")
    parser.add_argument("--plan", action="store_true", help="print the seconds of each stage")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        _run_stage(options)
    return options


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BOXES]:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}: there are {', '.join(BOXES)}")
    return [name for name in BOXES if name in names]


def _run_stage(options: argparse.Namespace) -> None:
    """Run one stage in this process, and end it: 1 if a step failed."""
    from gpu_stages.context import StageRecord
    from gpu_stages.steps import STAGES

    name, work, box = options.stage
    stage = StageRecord(
        name=name,
        output=options.output,
        work=Path(work),
        dry=options.dry_run,
        deadline=time.monotonic() + float(box),
    )
    stage.attempt(name, lambda: STAGES[name](stage))
    sys.exit(1 if stage.failures else 0)


@dataclass(frozen=True)
class _Marked:
    """Process of a stage; its mark is in the environment of every process that comes from it."""

    process: "subprocess.Popen[bytes]"
    mark: str

    def kill(self) -> None:
        """End all of them, whatever session they are in."""
        while found := [pid for pid in _pids() if _is_marked(pid, self.mark)]:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.process.wait()


def _run_all(
    plan: Mapping[str, float], options: argparse.Namespace, work: Path
) -> dict[str, dict[str, Any]]:
    """Run each stage; time that one leaves is the next ones'."""
    ends: dict[str, dict[str, Any]] = {}
    start, planned = time.monotonic(), 0.0
    with ExitStack() as stack:
        if "full" in plan:
            seconds = sum(plan.values())
            for name in _BUILDS:
                stack.callback(_start(name, seconds, options, work, output=work).kill)
        for name, box in plan.items():
            planned += box
            left = max(planned - (time.monotonic() - start), 1.0)
            ends[name] = _in_process(name, left, options, work)
            print(f"=== {name}: {ends[name]['end']} after {ends[name]['seconds']} s", flush=True)
            if name == "full":
                stack.close()  # builds that were too slow must not disturb the others
    return ends


def _start(
    name: str, box: float, options: argparse.Namespace, work: Path, *, output: Path
) -> _Marked:
    words = [sys.executable, __file__, "--output", output.resolve()]
    words += ["--stage", name, work, box, *["--dry-run"] * options.dry_run]
    mark = uuid.uuid4().hex
    env = {**os.environ, "PYTHONPATH": _path(), "PYTHONUNBUFFERED": "1", _MARK: mark}
    with (options.output / "log").open("ab") as log:
        process = subprocess.Popen(
            [*map(str, words)], stdout=log, stderr=log, env=env, start_new_session=True
        )
    return _Marked(process, mark)


def _in_process(name: str, box: float, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    start = time.monotonic()
    with _peak_memory() as memory:
        marked = _start(name, box, options, work, output=options.output)
        try:
            code = marked.process.wait(box)
            end = "ok" if code == 0 else "with failures" if code == 1 else f"died ({code})"
        except subprocess.TimeoutExpired:
            code, end = -signal.SIGKILL, f"ended at its limit of {box:.0f} s"
        finally:
            marked.kill()
    seconds = round(time.monotonic() - start, 1)
    peak = f"{max(memory)} MiB" if memory else ""
    return {"code": code, "end": end, "seconds": seconds, "memory": peak}


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Context manager that samples the memory in use on the GPU; nothing without nvidia-smi."""
    samples: list[int] = []
    ended = threading.Event()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            try:
                done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=9)
                samples.append(int(done.stdout.split()[0]))
            except (OSError, subprocess.SubprocessError, ValueError, IndexError):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _path() -> str:
    """Return PYTHONPATH with the checkout and this folder, neither of which is installed."""
    own = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    return os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH", "")]))


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{_MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _finish(ends: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> int:
    """Write the page, print the summary, and return the exit status."""
    sys.path[:0] = [str(ROOT / "src")]
    from gpu_stages.page import render_page, summary

    for part in options.output.glob("*.part"):  # of a stage that was ended while it wrote
        part.unlink()
    content = {name: _content(options.output, name) for name in ends}
    page = render_page(content, ends, dry=options.dry_run)
    (options.output / "page.html").write_text(page)
    print("\n".join(summary(content, ends, dry=options.dry_run)))
    return int(options.dry_run and any(end["code"] for end in ends.values()))


def _content(output: Path, name: str) -> Mapping[str, Any]:
    empty: dict[str, Any] = {"facts": {}, "failures": {}, "metrics": [], "results": []}
    path = output / f"{name}.json"
    return {**empty, **(json.loads(path.read_text()) if path.exists() else {})}


if __name__ == "__main__":
    main()
