"""Prove and measure the GPU paths in minutes: one process, time box and JSON file per stage.

    PYTHONPATH=src python benchmarks/gpu.py --output DIR --budget 480
    PYTHONPATH=src python benchmarks/gpu.py --output DIR --dry-run      # on a CPU, tiny sizes
    python benchmarks/gpu.py --plan

A stage that fails or hangs costs no other: it is ended with its children when its time is up.
"""

import argparse
import html
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["BOXES", "boxes", "main"]

ROOT = Path(__file__).parent.parent
_MARK = "LATENTFORGE_GPU_RUN"

BOXES: Mapping[str, int] = {
    "devices": 20,
    "tests": 60,
    "demo": 90,
    "sd15": 180,
    "deci": 75,
    "vendors": 30,
    "recipes": 25,
}
"""Seconds of each stage on a GPU, in order of worth; 480 in all. Estimates: none has run on one."""

_DRY_BUDGET = 1800


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
    with tempfile.TemporaryDirectory(prefix="latentforge-gpu-") as work:
        ends = _run_all(plan, budget, options, Path(work))
    _write_page(options.output, ends)
    print("\n".join(_summary(ends)[:10]))
    if options.dry_run and any(end["code"] != 0 for end in ends.values()):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of all stages")
    parser.add_argument("--stages", type=_stages, default=list(BOXES), metavar="NAME,...")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, tiny sizes")
    parser.add_argument("--plan", action="store_true", help="print the seconds of each stage")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        _run_stage(options)
        sys.exit(0)
    return options


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BOXES]:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}: there are {', '.join(BOXES)}")
    return [name for name in BOXES if name in names]


def _run_stage(options: argparse.Namespace) -> None:
    """Run one stage in this process."""
    from gpu_stages.context import StageRecord
    from gpu_stages.steps import STAGES

    name, work = options.stage
    stage = StageRecord(name, options.output, Path(work), options.dry_run)
    STAGES[name](stage)
    failed = [
        key for key, fact in stage.facts.items() if isinstance(fact, dict) and fact.get("code")
    ]
    if options.dry_run and name == "vendors":
        failed = []  # their libraries are for GPUs: refusals are what a rehearsal has to show
    if options.dry_run and name == "tests" and stage.facts["pytest"]["code"] in (0, 5):
        failed = []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _run_all(
    plan: Mapping[str, float], budget: float, options: argparse.Namespace, work: Path
) -> dict[str, dict[str, Any]]:
    """Run each stage; time that one leaves is the next ones', within the budget."""
    ends: dict[str, dict[str, Any]] = {}
    start, planned = time.monotonic(), 0.0
    for name, box in plan.items():
        planned += box
        left = min(planned, budget) - (time.monotonic() - start)
        ends[name] = _in_process(name, max(left, 1.0), options, work)
        print(f"=== {name}: {ends[name]['end']} after {ends[name]['seconds']} s", flush=True)
    return ends


def _in_process(name: str, box: float, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--output", options.output.resolve(), "--stage", name, work]
    words += ["--dry-run"] * options.dry_run
    mark, start = uuid.uuid4().hex, time.monotonic()
    env = {**os.environ, "PYTHONPATH": _path(), "PYTHONUNBUFFERED": "1", _MARK: mark}
    log = options.output / "log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*map(str, words)], stdout=out, stderr=out, env=env, start_new_session=True
        )
        try:
            code = process.wait(box)
            end = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            code, end = -signal.SIGKILL, f"ended at its limit of {box:.0f} s"
        finally:
            _kill_marked(mark, process)
    return {"code": code, "end": end, "seconds": round(time.monotonic() - start, 1)}


def _path() -> str:
    """Return PYTHONPATH with the checkout and this folder, neither of which is installed."""
    own = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    return os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH", "")]))


def _kill_marked(mark: str, process: "subprocess.Popen[bytes]") -> None:
    """End a stage with all processes that come from it, whatever session they are in."""
    while found := [pid for pid in _pids() if _is_marked(pid, mark)]:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.poll()
        time.sleep(0.02)
    process.wait()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{_MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _facts(output: Path, name: str) -> dict[str, Any]:
    path = output / f"{name}.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def _summary(ends: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{name:<10}{end['seconds']:7.1f} s  {end['end']}" for name, end in ends.items()]


def _write_page(output: Path, ends: Mapping[str, Mapping[str, Any]]) -> None:
    """Write every fact of every stage, and the benchmarks as latentforge's report draws them."""
    parts = ["<meta charset=utf-8><title>GPU paths</title><h1>GPU paths</h1><pre>"]
    parts += [html.escape("\n".join(_summary(ends))), "</pre>"]
    for name in ends:
        facts = json.dumps(_facts(output, name), indent=1, ensure_ascii=False)
        parts.append(f"<h2>{name}</h2><pre>{html.escape(facts)}</pre>")
    (output / "page.html").write_text("\n".join(parts))
    measured = sorted(output.glob("*-bench.json"))
    if measured:
        words = [sys.executable, "-m", "latentforge", "report", *measured]
        words += ["-o", output / "bench.html"]
        subprocess.run([*map(str, words)], env={**os.environ, "PYTHONPATH": _path()})


if __name__ == "__main__":
    main()
