"""benchmarks/gpu.py, rehearsed on the CPU; whole with -m slow."""

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


def rehearse(output: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the script as a user would, from a checkout that is not installed."""
    words = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": str(gpu.ROOT / "src")}
    return subprocess.run([*words, *options], capture_output=True, text=True, env=env)


def test_the_cheapest_stage_leaves_its_file_the_log_and_the_page(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--dry-run", "--stages", "devices")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "devices.json").read_text())
    assert facts["MatMul CPUExecutionProvider float16"].startswith("largest error 0.0")
    assert "MatMul CPUExecutionProvider" in (tmp_path / "log").read_text()
    assert "MatMul CPUExecutionProvider float32" in (tmp_path / "page.html").read_text()


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


@pytest.mark.slow
def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + (tmp_path / "log").read_text()[-20_000:]
    assert all((tmp_path / f"{name}.json").exists() for name in gpu.BOXES)
    assert (tmp_path / "bench.html").exists()
