"""Prove and measure the GPU paths in minutes: one process, time box and JSON file per stage.

    PYTHONPATH=src python benchmarks/gpu.py --output DIR --budget 480
    PYTHONPATH=src python benchmarks/gpu.py --output DIR --dry-run      # on a CPU, tiny sizes
    python benchmarks/gpu.py --plan

A stage that fails or hangs costs no other: it is ended with its children when its time is up. The
engines that ``full`` measures are made from the start on, beside the stages before it; nothing runs
beside ``full``. DIR gets a JSON file per stage, a log and a page: at most eight files.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_stages.processes import StageProcess, peak_memory

__all__ = ["BOXES", "boxes", "main"]

ROOT = Path(__file__).parent.parent

BOXES: Mapping[str, int] = {
    "devices": 15,
    "tests": 40,
    "demo": 90,
    "others": 45,
    "full": 280,
    "xl": 10,
}
"""Seconds of each stage on a GPU, 480 in all; time that one leaves is the next ones'.

Estimates: none has run on a GPU. They are in order of worth, except that ``others`` runs while the
engines of ``full`` are being made.
"""

_MEASURING = 100  # seconds of ``full`` that are left when the last engines have to be there
_ALL_OF_IT = 240  # and those that all of its measurements take
_BUILDS = ("build-sd15", "build-deci1")
_COMPILE = "build-compile"  # torch's own, which is waited for only if time is left
_DRY_BUDGET = 3000


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
    for name in plan:  # of an earlier run
        (options.output / f"{name}.json").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the stages too
    with tempfile.TemporaryDirectory(prefix="latentforge-gpu-", ignore_cleanup_errors=True) as work:
        run = _StageRun(plan, options.output, Path(work), options.dry_run)
        try:
            run.say("plan: " + ", ".join(f"{name} {plan[name]:.0f} s" for name in plan))
            run.stages()
            failed = run.finish()
        finally:
            run.publish_log()
    sys.exit(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = ", ".join(f"{name} {seconds}" for name, seconds in BOXES.items())
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"of all stages (default: {plan})"
    )
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
class _StageRun:
    """One run of the script.

    Attributes:
        plan: seconds of each stage.
        output: folder of the results.
        work: folder of checkpoints, engines and the log so far.
        dry: rehearse.
        ends: how each stage ended.
    """

    plan: Mapping[str, float]
    output: Path
    work: Path
    dry: bool
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def say(self, line: str) -> None:
        """Print a line, and add it to the log."""
        print(line, flush=True)
        with (self.work / "log").open("a") as log:
            log.write(line + "\n")

    def publish_log(self) -> None:
        """Put the log so far in place of the last one, whoever else writes to that."""
        part = self.output / "log.part"
        with suppress(OSError):
            part.write_bytes((self.work / "log").read_bytes())
            os.replace(part, self.output / "log")

    def stages(self) -> None:
        """Run each stage within its box, and the builds for ``full`` before it."""
        with ExitStack() as stack:
            builds = self._builds(stack) if "full" in self.plan else {}
            for name in self.plan:
                if name == "full":
                    self._end_builds(builds)
                self.ends[name] = self._in_process(name, max(self._until(name), 1.0))
                end = self.ends[name]
                self.say(f"=== {name}: {end['end']} after {end['seconds']} s")
                self.publish_log()

    def _until(self, stage: str) -> float:
        """Return the seconds until the end of a stage by the plan."""
        names = list(self.plan)
        planned = sum(self.plan[name] for name in names[: names.index(stage) + 1])
        return planned - (time.monotonic() - self.start)

    def _builds(self, stack: ExitStack) -> dict[str, StageProcess]:
        seconds = self._until("full") - _MEASURING
        builds = {}
        for name in (*_BUILDS, _COMPILE):
            builds[name] = self._process(name, seconds, output=self.work)
            stack.callback(builds[name].kill)
        return builds

    def _end_builds(self, builds: Mapping[str, StageProcess]) -> None:
        """Wait for the builds, and end those that are too slow: they would disturb the others."""
        for names, needed in ((_BUILDS, _MEASURING), ((_COMPILE,), _ALL_OF_IT)):
            while self._until("full") > needed and any(builds[n].is_running for n in names):
                time.sleep(0.2)
        for process in builds.values():
            process.kill()

    def _process(self, name: str, box: float, *, output: Path) -> StageProcess:
        words = [sys.executable, __file__, "--output", output.resolve()]
        words += ["--stage", name, self.work, box, *["--dry-run"] * self.dry]
        env = {
            "PYTHONPATH": _path(),
            "LD_LIBRARY_PATH": _libraries(),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "torch-compiler"),
            "HF_HUB_OFFLINE": "1",
        }
        return StageProcess.start([*map(str, words)], self.work / "log", env)

    def _in_process(self, name: str, box: float) -> dict[str, Any]:
        start = time.monotonic()
        with peak_memory() as memory:
            process = self._process(name, box, output=self.output)
            code = None
            try:
                code = process.wait(box)
            finally:
                left = process.kill()
        end = f"ended at its limit of {box:.0f} s" if code is None else _end(code)
        return {
            "code": -signal.SIGKILL if code is None else code,
            "end": end + (f", and {left} of its processes cannot be ended" if left else ""),
            "seconds": round(time.monotonic() - start, 1),
            "memory": f"{max(memory)} MiB" if memory else "",
        }

    def finish(self) -> int:
        """Print the summary, write the page, and return the exit status."""
        sys.path[:0] = [str(ROOT / "src")]
        from gpu_stages.page import render_page, summary

        for part in self.output.glob("*.part"):  # of a stage that was ended while it wrote
            part.unlink()
        content = {name: _content(self.output, name) for name in self.ends}
        for line in summary(content, self.ends, dry=self.dry):
            self.say(line)
        try:
            page = render_page(content, self.ends, dry=self.dry)
        except Exception:  # the files are there all the same
            self.say(f"no page: {traceback.format_exc()}")
            return 1
        (self.output / "page.html").write_text(page, encoding="utf-8")
        return int(any(end["code"] for end in self.ends.values()))


def _end(code: int) -> str:
    return {0: "ok", 1: "with failures"}.get(code, f"died ({code})")


def _path() -> str:
    """Return PYTHONPATH with the checkout, the demo checkpoint and this folder, none installed."""
    own = [str(ROOT / folder) for folder in ("src", "demo/src", "benchmarks")]
    return os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH", "")]))


def _libraries() -> str:
    """Return LD_LIBRARY_PATH with the CUDA libraries that come as packages, beside torch."""
    packages = find_spec("nvidia")
    roots = (packages.submodule_search_locations if packages else None) or ()
    found = [str(path) for root in roots for path in sorted(Path(root).glob("**/lib"))]
    return os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH", ""), *found]))


def _content(output: Path, name: str) -> Mapping[str, Any]:
    empty: dict[str, Any] = {"facts": {}, "failures": {}, "metrics": [], "results": []}
    path = output / f"{name}.json"
    return {**empty, **(json.loads(path.read_text()) if path.exists() else {})}


if __name__ == "__main__":
    main()
