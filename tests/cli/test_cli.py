"""The command line: exit status, one-line errors, no leftover files, and help."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from latentforge.__main__ import main

COMMANDS = ("build", "export", "optimize", "run", "bench", "report", "compare", "inspect", "verify")
COMMANDS += ("demo", "distill", "eval", "search", "serve")


def latentforge(
    *arguments: str | Path, cwd: Path, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "latentforge", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


def here(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported torch, and not in one of its own."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as end:  # of options that do not parse
        status = int(end.code or 0)
    output, errors = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, status, output, errors)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check for exit status 2 and one line with all the words."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("latentforge: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_help_names_every_command_and_the_exit_statuses(tmp_path: Path) -> None:
    text = latentforge("--help", cwd=tmp_path).stdout
    assert all(f"    {command} " in text for command in COMMANDS)
    assert "exit status" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    result = latentforge(command, "--help", cwd=tmp_path)
    assert result.returncode == 0 and len(result.stdout) > 300


def test_run_help_lists_the_samplers(tmp_path: Path) -> None:
    assert "dpmpp_2m_karras" in latentforge("run", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "engines", "a cat", "-o", "a.png", "--exact"], "--exact; did you mean --unaccel"),
        (["run", "engines", "a cat", "-o", "a.png", "--stpes=3"], "did you mean --steps?"),
        (["build", "demo", "out", "--presicion", "int8"], "did you mean --precision?"),
        (["build", "demo", "out", "--exact"], "--exact; see latentforge build --help"),
        (["build", "demo", "out", "another"], "arguments: another; see latentforge build --help"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_options_may_be_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere", "a cat", "-o", "a.png", "--step=3"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and "unrecognized" not in error


def test_no_command_is_bad_usage(tmp_path: Path) -> None:
    assert latentforge(cwd=tmp_path).returncode == 2


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Here:
    """A function that runs a command in this process, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return partial(here, capsys)


@pytest.fixture(scope="module")
def made(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with two images for each of two prompts, from one run."""
    directory = tmp_path_factory.mktemp("made")
    request = ["a", "b", "--images", "2", "--steps", "2", "--seed", "9", "-o", "image.png"]
    result = latentforge("run", tiny_engines, *request, cwd=directory)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"image-{n}.png" for n in (1, 2, 3, 4)]
    return directory


def test_run_numbers_several_images(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [f"image-{n}.png" for n in (1, 2, 3, 4)]


def test_run_stores_the_settings_in_the_image(made: Path) -> None:
    text = json.loads(Image.open(made / "image-3.png").text["latentforge"])  # type: ignore[attr-defined]
    assert text["prompt"] == "b" and text["seed"] == 9 and text["steps"] == 2


def test_run_takes_a_seed_for_each_image(tiny_engines: Path, tmp_path: Path) -> None:
    request = ["a", "b", "--seed", "9,-3", "--steps", "2", "-o", "image.png"]
    result = latentforge("run", tiny_engines, *request, cwd=tmp_path)
    assert result.returncode == 0 and "seed 9, -3" in result.stderr
    for number, seed in ((1, 9), (2, -3)):
        image = Image.open(tmp_path / f"image-{number}.png")
        text = json.loads(image.text["latentforge"])  # type: ignore[attr-defined]
        assert text["seed"] == seed and text["seeds"] == [9, -3]


def test_equal_commands_write_equal_bytes(made: Path, tiny_engines: Path, tmp_path: Path) -> None:
    request = ["a", "b", "--images", "2", "--steps", "2", "--seed", "9", "-o", "image.png"]
    latentforge("run", tiny_engines, *request, cwd=tmp_path)
    for name in ("image-1.png", "image-4.png"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (["a", "--sampler", "eular"], ["no sampler 'eular'", "dpmpp_2m", "ddim"]),
        (["a", "--steps", "0"], ["steps", "0"]),
        (["a", "--steps", "-1"], ["steps", "-1"]),
        (["a", "--guidance", "nan"], ["guidance_scale", "nan"]),
        (["a", "--height", "33"], ["height", "multiple of", "33"]),
        (["x" * 100_000], ["100,000 characters"]),
        (["a", "--seed", str(2**70)], ["seed"]),
        (["a", "--images", "0"], ["images_per_prompt"]),
        (["a", "--threads", "-3"], ["threads"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_run_refuses(
    inside: Here, tiny_engines: Path, tmp_path: Path, request_: list[str], words: list[str]
) -> None:
    refused(inside("run", tiny_engines, *request_, "-o", "a.png"), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["missing/a.png", "a.docx", "a", "/proc/a.png"])
def test_run_refuses_an_output_before_it_works(
    inside: Here, tiny_engines: Path, tmp_path: Path, output: str
) -> None:
    refused(inside("run", tiny_engines, "a", "-o", output), output)
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_damage(tiny_engines: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "engines"
    shutil.copytree(tiny_engines, damaged)
    content = bytearray((damaged / "denoiser.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "denoiser.onnx").write_bytes(content)
    refused(
        latentforge("run", damaged, "a", "-o", "a.png", cwd=tmp_path), "denoiser.onnx", "sha256"
    )
    refused(latentforge("verify", damaged, cwd=tmp_path), "denoiser.onnx", "sha256")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("command", ["run", "inspect", "verify", "bench"])
def test_no_engine_directory(command: str, tmp_path: Path) -> None:
    more = ["a", "-o", "a.png"] if command == "run" else []
    refused(latentforge(command, "nowhere", *more, cwd=tmp_path), "nowhere", "manifest.json")


def test_build_refuses_what_is_no_checkpoint(inside: Here, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(inside("build", "empty", "out"), "empty", "model_index.json")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_build_refuses_to_overwrite(tiny_engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(here(capsys, "build", "demo", tiny_engines), "--overwrite")


def test_optimize_help_lists_the_recipes(tmp_path: Path) -> None:
    text = latentforge("optimize", "--help", cwd=tmp_path).stdout
    assert all(f"\n  {name} " in text for name in ("auto", "fp16", "fp32", "int8", "int8-weights"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "int8", "--recipe", "mine.toml"], ["--precision", "give only one"]),
        (["--layout", "optimum", "--precision", "int8"], ["--layout optimum"]),
        (["--recipe", "int9"], ["int9", "did you mean 'int8'"]),
    ],
)
def test_build_refuses_recipes_before_it_exports(
    tmp_path: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(here(capsys, "build", "demo", tmp_path / "out", *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_optimize_and_gate(inside: Here, tiny_engines: Path, tmp_path: Path) -> None:
    """A result with its figures, and a rejected one, with exit status 3."""
    options = ["--recipe", "fp16", "--steps", "2", "--repeats", "1", "--gate", "images=1"]
    result = latentforge("optimize", tiny_engines, "out", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "class A: same images" in result.stdout and "denoiser step" in result.stdout
    assert "denoiser/hoist-prompt: " in inside("inspect", "out").stdout
    failed = inside("optimize", tiny_engines, "strict", *options, "--gate", "psnr=199")
    assert failed.returncode == 3 and "strict.rejected" in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "strict.rejected"]


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_optimization_leaves_nothing(
    tiny_engines: Path, tmp_path: Path, signal_: signal.Signals
) -> None:
    command = [sys.executable, "-m", "latentforge", "optimize", str(tiny_engines), "out"]
    interrupted(command, tmp_path, signal_)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = latentforge("verify", "nowhere", "--debug", cwd=tmp_path)
    assert "Traceback" in result.stderr and "ManifestError" in result.stderr


def test_verify_and_inspect_describe_the_engines(tiny_engines: Path, tmp_path: Path) -> None:
    verified = latentforge("verify", tiny_engines, cwd=tmp_path)
    assert verified.returncode == 0 and verified.stdout.count("ok  ") == 6
    inspected = latentforge("inspect", tiny_engines, "--json", "-", cwd=tmp_path)
    assert json.loads(inspected.stdout)["components"].keys() >= {"denoiser", "vae_encoder"}


def test_bench_writes_json_alone_on_stdout(tiny_engines: Path, tmp_path: Path) -> None:
    """Engines against their own checkpoint: the same image, and a speedup."""
    options = ["--against", "eager", "--steps", "2", "--repeats", "2", "--json", "-"]
    result = latentforge("bench", tiny_engines, *options, "--html", "b.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    eager, ours = json.loads(result.stdout)["entries"]
    assert (eager["name"], eager["role"]) == ("eager", "reference")
    assert eager["ratio"]["total"]["value"] == 1.0
    assert ours["psnr"] > 40 and ours["speed_class"] == "A" and len(ours["runs"]) == 2
    assert ours["peak_memory"] < 0.6 * eager["peak_memory"]
    page = (tmp_path / "b.html").read_text()
    assert "http://" not in page and "https://" not in page and "eager" in page


def test_bench_refuses_an_unknown_peer(inside: Here, tiny_engines: Path) -> None:
    refused(inside("bench", tiny_engines, "--against", "egaer"), "no peer 'egaer'", "eager")


def test_bench_refuses_a_missing_checkpoint(inside: Here, tiny_engines: Path) -> None:
    options = ["--against", "eager", "--checkpoint", "no-such-directory", "--repeats", "1"]
    refused(inside("bench", tiny_engines, *options), "no-such-directory")


def test_missing_and_failing_peers_are_reported(
    inside: Here, tiny_engines: Path, tmp_path: Path
) -> None:
    """One is not installed here, and the interpreter of another does not exist."""
    options = ["--against", "sd-cpp,openvino-genai", "--python", "openvino-genai=/bin/false"]
    options += ["--steps", "1", "--repeats", "1"]
    result = inside("bench", tiny_engines, *options, "--json", "b.json")
    assert result.returncode == 2 and "sd-cpp did not run" in result.stderr.splitlines()[-1]
    missing, failed, ours = json.loads((tmp_path / "b.json").read_text())["entries"]
    assert missing["status"] == "missing" and "pip install" in missing["message"]
    assert failed["status"] == "failed" and ours["status"] == "ok"
    assert "sd-cpp: missing" in result.stdout


@pytest.mark.parametrize(
    "options", [["--python", "eager"], ["--batches", "two"], ["--sizes", "0"], ["--repeats", "0"]]
)
def test_bench_refuses_bad_options(inside: Here, tiny_engines: Path, options: list[str]) -> None:
    result = inside("bench", tiny_engines, *options)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_an_interrupted_bench_ends_its_participants(tiny_engines: Path, tmp_path: Path) -> None:
    """Interrupt a benchmark whose participant is in the middle of many steps."""
    engines = tmp_path / "mine"
    engines.symlink_to(tiny_engines)
    command = [sys.executable, "-m", "latentforge", "bench", str(engines), "--steps", "900"]
    command += ["--repeats", "900"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (workers := _workers_of(process.pid)) and process.poll() is None:
        time.sleep(0.05)
    assert "Traceback" not in stopped(process, signal.SIGINT)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def _workers_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_interrupted_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By Ctrl-C alone: commands treat both signals alike, and to import torch takes seconds."""
    command = [sys.executable, "-m", "latentforge", "export", str(tiny_checkpoint), "out"]
    interrupted(command, tmp_path, signal.SIGINT)


def interrupted(command: list[str], tmp_path: Path, signal_: signal.Signals) -> None:
    """Start a command that writes ``out``, stop it at work, and check that nothing is left."""
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.partial-*")) and process.poll() is None:
        time.sleep(0.05)
    errors = stopped(process, signal_)
    assert "interrupted" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def stopped(process: subprocess.Popen[str], signal_: signal.Signals) -> str:
    """Stop a command as Ctrl-C does, and return its standard error."""
    for _ in range(3):  # a library may swallow one, as people know who press Ctrl-C again
        os.kill(process.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    return errors
