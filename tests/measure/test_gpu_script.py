"""benchmarks/gpu.py, rehearsed on the CPU; whole with -m slow."""

import ast
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pytest
from gpu_stages import context, full_size, operators, pictures, steps
from gpu_stages.context import StageRecord
from gpu_stages.page import aims, render_page, summary

import latentforge
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
    assert len(done.stdout.splitlines()) <= 2 + 10
    assert (tmp_path / "log").read_text().startswith("plan: devices 3000 s\n")


def test_a_checkout_is_enough() -> None:
    """The packages that are not on a GPU machine come from it, before any that are installed."""
    for name in ("latentforge", "latentforge_demo", "gpu_stages"):
        found = PathFinder.find_spec(name, gpu._path().split(os.pathsep))
        assert found is not None and str(found.origin).startswith(str(gpu.ROOT)), name


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
    assert gpu.boxes(["devices", "demo"], 42) == {"devices": 6, "demo": 36}
    assert "no stage 'demos'" in rehearse(tmp_path, "--stages", "demos").stderr


def hanging(tmp_path: Path, monkeypatch: Any, *, before: str = "") -> gpu._StageRun:
    """Return a run whose stages never end.

    A child of theirs is in a session of its own, as the participants of a benchmark are.
    """
    program = tmp_path / "hangs.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
        "name = sys.argv[sys.argv.index('--stage') + 1]\n"
        "p = subprocess.Popen(child, start_new_session=True)\n"
        f"(Path({str(tmp_path)!r}) / f'{{name}}.pid').write_text(str(p.pid))\n"
        f"{before}\n"
        "time.sleep(99)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(program))
    work = tmp_path / "work"
    work.mkdir()
    return gpu._StageRun({"devices": 2.0, "full": 2.0}, tmp_path, work, True)


def has_ended(pid: Path) -> bool:
    status = Path("/proc") / pid.read_text() / "status"
    try:
        return "State:\tZ" in status.read_text()
    except FileNotFoundError:
        return True


def test_stages_that_hang_are_ended_with_their_children(tmp_path: Path, monkeypatch: Any) -> None:
    """So are the builds for ``full``, before it starts; and its time stays its own."""
    run = hanging(tmp_path, monkeypatch, before="print(name, 'was here', flush=True)")
    monkeypatch.setattr(gpu, "_MEASURING", 0.5)
    start = time.monotonic()
    run.stages()
    assert time.monotonic() - start < 10
    assert all(end["end"].startswith("ended at its limit") for end in run.ends.values())
    pids = sorted(tmp_path.glob("*.pid"))
    assert [pid.stem for pid in pids] == sorted(["devices", "full", *gpu._BUILDS, gpu._COMPILE])
    assert all(map(has_ended, pids))
    assert run.ends["full"]["seconds"] < 1.5  # the builds had the rest
    assert "full was here" in (tmp_path / "log").read_text()


def test_the_log_survives_a_pipe_that_writes_to_the_same_file(tmp_path: Path) -> None:
    """It is put in place of the other file, which goes on without a name."""
    (tmp_path / "work").mkdir()
    run = gpu._StageRun({}, tmp_path, tmp_path / "work", True)
    with (tmp_path / "log").open("w") as piped:  # by tee
        for line in ("one", "two"):
            run.say(line)
            run.publish_log()
            piped.write(line)
            piped.flush()
            assert (tmp_path / "log").read_text().endswith(f"{line}\n")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_command_that_outlasts_its_stage_leaves_what_it_wrote(tmp_path: Path) -> None:
    soon = time.monotonic() + 3.0
    stage = StageRecord(name="demo", output=tmp_path, work=tmp_path, dry=True, deadline=soon)
    program = "import time; print('so far', flush=True); time.sleep(99)"
    assert not stage.command("slow", sys.executable, "-c", program)
    assert time.monotonic() < soon and stage.failures["slow"].startswith("out of time\nso far")


def test_results_of_an_earlier_run_are_not_taken_for_this_one(tmp_path: Path) -> None:
    """Whether the stage that is ended has written something of its own or not."""
    (tmp_path / "devices.json").write_text('{"facts": {"of": "an earlier run"}}')
    done = rehearse(tmp_path, "--stages", "devices", "--budget", "0.1")
    assert done.returncode == 1 and "devices ended at its limit" in done.stdout
    for path in tmp_path.iterdir():
        assert "an earlier run" not in path.read_text(), path


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_an_operator_that_computes_something_else_is_a_failure(wrong: float) -> None:
    """QuickGelu of alpha 1.702 has a kernel on the CPU; another alpha is another function."""
    gelu = next(one for one in operators.OPERATORS if one.name == "QuickGelu")
    provider = "CPUExecutionProvider"
    assert operators._compare(gelu, np.dtype("float16"), provider).startswith("largest error")
    made = operators._made

    def changed(*args: Any) -> Any:
        return made(*args) + wrong

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "_made", changed)
        with pytest.raises(ValueError, match="largest error") if wrong else nullcontext():
            operators._compare(gelu, np.dtype("float32"), provider)


def test_pictures_are_judged_beside_diffusers(demo_engines: Path, tmp_path: Path) -> None:
    stage = StageRecord(name="demo", output=tmp_path, work=tmp_path, dry=True)
    pictures._pictures(stage, demo_engines, "fp32")
    assert not stage.failures and stage.facts["fp32: two threads"] == "the images of one"
    kinds = {(metric["subject"], metric["images"]) for metric in stage.metrics}
    assert {("fp32 ddim", 1), ("fp32 euler", 4), ("fp32 image to image", 1)} < kinds
    assert all(metric["value"] > 60 for metric in stage.metrics)
    pictures.judge(stage, "PSNR", "another", 1, 29.9)
    assert list(stage.failures) == ["another, batch 1"]


def test_a_session_without_io_binding_draws_the_same_image(demo_engines: Path) -> None:
    images = []
    for wrap in (None, lambda _, session: pictures.Unbound(session)):
        with latentforge.load(demo_engines, wrap_session=wrap) as pipe:
            images.append(pictures._draw(pipe, 1))
    np.testing.assert_array_equal(*images)


@pytest.mark.thorough
def test_engines_are_timed_beside_torch_and_missing_ones_are_named(
    tiny_engines: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As ``full`` does, with the engines that the builds have left: one of two."""
    stage = StageRecord(name="full", output=tmp_path, work=tmp_path, dry=True)
    (tmp_path / "sd15").symlink_to(tiny_checkpoint)
    made = {"facts": {"sd15: export": "1 s", "engines": str(tiny_engines)}, "failures": {}}
    (tmp_path / "build-sd15.json").write_text(json.dumps(made))
    assert full_size._built(stage, "deci1") is None
    assert stage.failures["deci1: build"] == "its engines were not ready in time"
    engines = full_size._built(stage, "sd15")
    assert engines == tiny_engines and stage.facts["sd15: export"] == "1 s"
    full_size._study(stage, "batch 1", full_size._participants(stage, "sd15", engines))
    assert list(stage.failures) == ["deci1: build"]
    assert [entry["status"] for entry in stage.results[0]["entries"]] == ["ok", "ok"]
    assert stage.metrics[0]["value"] > 60 and stage.metrics[0]["subject"] == "batch 1: sd15-ours"
    full_size.xl(replace(stage, dry=False, deadline=time.monotonic() + 60))
    assert "not run: 60 s are left of the 200 that it takes" in stage.facts["xl"]


def test_a_model_that_cannot_be_compiled_or_drawn_is_a_failure(tmp_path: Path) -> None:
    stage = StageRecord(name="full", output=tmp_path, work=tmp_path, dry=False)
    late = replace(stage, deadline=time.monotonic() + 50)
    full_size._beside_compile(late, tmp_path)
    assert "50 s are left: it takes 150" in stage.failures["torch.compile"]
    failed = BenchResult(name="sd15-ours", role="engines", status="failed", message="no memory")
    full_size._judge(stage, "batch 1: sd15-ours", failed, "sd15", 1)
    assert stage.failures["batch 1: sd15-ours"] == "no memory" and not stage.metrics
    (tmp_path / "build-sd15.json").write_text('{"facts": {"engines": ""}}')
    with pytest.raises(FileNotFoundError, match="build of sd15 ended without"):
        full_size._written(stage, "sd15")


def test_the_script_is_of_python_3_10_and_needs_what_a_gpu_machine_has() -> None:
    folder = gpu.ROOT / "benchmarks"
    needed = {"latentforge", "numpy", "onnx", "onnxruntime", "torch", "msgspec", "gpu_stages"}
    local = {"background", "checkpoints", "tiny"}
    for path in [
        folder / "gpu.py",
        folder / "background.py",
        *sorted((folder / "gpu_stages").glob("*.py")),
    ]:
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        ]
        used = {str(name).partition(".")[0] for name in names}
        assert used <= needed | local | set(sys.stdlib_module_names), path


@pytest.mark.parametrize("outcome, fails", [("3 passed, 2 skipped", 0), ("5 skipped", 1)])
def test_tests_that_are_all_skipped_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, fails: int
) -> None:
    line = f"tests/gpu/test_x.py SKIPPED\n===== {outcome} in 1.04s ====="
    monkeypatch.setattr(context, "_run", lambda *_: (0, line, ""))
    for dry in (False, True):
        stage = StageRecord(name="tests", output=tmp_path, work=tmp_path, dry=dry)
        steps.tests(stage)
        assert len(stage.failures) == (0 if dry else fails)


@pytest.mark.slow
def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + (tmp_path / "log").read_text()[-20_000:]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {*(f"{name}.json" for name in gpu.BOXES), "log", "page.html"}
    assert len(files) <= 8  # few enough to be copied from a machine by name
