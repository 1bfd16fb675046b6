"""benchmarks/gpu.py, rehearsed on the CPU; whole with -m slow."""

import ast
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gpu
import pytest
from gpu_stages.context import StageRecord
from gpu_stages.page import aims, render_page, summary

from latentforge.measure.results import BenchResult, ConfidenceInterval, Results


def rehearse(output: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the script as a user would, from a checkout that is not installed."""
    words = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": str(gpu.ROOT / "src")}
    return subprocess.run([*words, *options], capture_output=True, text=True, env=env)


def test_the_cheapest_stage_leaves_its_file_the_log_and_the_page(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--dry-run", "--stages", "devices")
    assert done.returncode == 0, done.stdout + done.stderr
    stage = json.loads((tmp_path / "devices.json").read_text())
    assert stage["facts"]["MatMul CPUExecutionProvider float16"].startswith("largest error 0.0")
    assert not stage["failures"]
    assert "MatMul CPUExecutionProvider" in (tmp_path / "log").read_text()
    page = (tmp_path / "page.html").read_text()
    assert "MatMul CPUExecutionProvider float32" in page and "not measured" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["devices.json", "log", "page.html"]
    assert len(done.stdout.splitlines()) <= 1 + 10


def test_a_stage_keeps_each_error_whole_and_goes_on(tmp_path: Path) -> None:
    stage = StageRecord(name="demo", output=tmp_path, work=tmp_path, dry=True)
    assert stage.attempt("one", lambda: 1 / 0) is None and stage.attempt("two", lambda: 2) == 2
    words = [sys.executable, "-c", "import sys; print('x' * 9000); sys.exit('in the end ' * 500)"]
    assert not stage.command("three", *words) and stage.command("four", *words, codes=(1,))
    content = json.loads((tmp_path / "demo.json").read_text())
    assert "ZeroDivisionError" in content["failures"]["one"] and len(content["failures"]) == 2
    assert content["failures"]["three"].count("x") > 9000
    assert content["failures"]["three"].count("in the end") == 500
    page = render_page({"demo": content}, {"demo": ENDED}, dry=False)
    assert content["failures"]["three"] in page and "demo: three" in page
    assert "in the end" in content["facts"]["four"]


ENDED = {"code": 1, "end": "with failures", "seconds": 2.0, "memory": "900 MiB"}


def entry(name: str, seconds: float, speedup: float, **changes: Any) -> BenchResult:
    return BenchResult(
        name=name,
        role="reference" if speedup == 1 else "engines",
        median={"total": seconds},
        ratio={"total": ConfidenceInterval(value=speedup)},
        **changes,
    )


def test_aims_are_judged_by_what_was_measured(tmp_path: Path) -> None:
    stage = StageRecord(name="full", output=tmp_path, work=tmp_path, dry=False)
    first = (entry("sd15-eager", 1.2, 1), entry("sd15-ours", 0.4, 3, ready_seconds=(6.0, 5.5)))
    first += (entry("deci1-ours", 0.5, 2.4),)
    shared: dict[str, Any] = {"command": "", "date": "2026-01-01T00:00:00+00:00", "machine": {}}
    stage.add(Results(title="sd15, deci1: batch 1", entries=first, **shared))
    stage.measure("PSNR to diffusers", "sd15-ours", 1, 44.0, "dB")
    content = {"full": json.loads((tmp_path / "full.json").read_text())}
    verdicts = [aim.verdict for aim in aims(content)]
    assert verdicts == ["reached", "not measured", "reached", "missed", "reached", "missed"]
    assert {aim.verdict for aim in aims(content, dry=True)} == {"a rehearsal", "not measured"}
    lines = summary(content, {"full": ENDED}, dry=False)
    assert len(lines) <= 10 and "full with failures" in lines[1]
    assert any("0.4 s, at most 0.5 s: reached" in line for line in lines)
    page = render_page(content, {"full": ENDED}, dry=False)
    assert "sd15, deci1: batch 1" in page and "900 MiB" in page and "2.4x" in page


def test_the_plan_is_eight_minutes_in_order_of_worth(tmp_path: Path) -> None:
    lines = rehearse(tmp_path, "--plan").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.BOXES)
    assert sum(float(line.split()[1]) for line in lines) == 480
    assert gpu.boxes(["devices", "tests"], 40) == {"devices": 10, "tests": 30}
    assert "no stage 'demos'" in rehearse(tmp_path, "--stages", "demos").stderr


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: Any) -> None:
    """Its child is in a session of its own, as the participants of a benchmark are."""
    program = tmp_path / "hangs.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
        "p = subprocess.Popen(child, start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        "time.sleep(99)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(program))
    options = Namespace(output=tmp_path, dry_run=True)
    start = time.monotonic()
    end = gpu._in_process("devices", 2.0, options, tmp_path)
    assert time.monotonic() - start < 10 and end["end"].startswith("ended at its limit")
    status = Path("/proc") / (tmp_path / "pid").read_text() / "status"
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_the_script_is_of_python_3_10_and_needs_what_a_gpu_machine_has() -> None:
    folder = gpu.ROOT / "benchmarks"
    needed = {"latentforge", "numpy", "onnx", "onnxruntime", "torch", "msgspec", "gpu_stages"}
    local = {"checkpoints", "tiny"}
    for path in [folder / "gpu.py", *sorted((folder / "gpu_stages").glob("*.py"))]:
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        ]
        used = {str(name).partition(".")[0] for name in names}
        assert used <= needed | local | set(sys.stdlib_module_names), path


@pytest.mark.slow
def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + (tmp_path / "log").read_text()[-20_000:]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {*(f"{name}.json" for name in gpu.BOXES), "log", "page.html"}
    assert len(files) <= 8  # so many come back from a machine that is lent
