"""No file is run because of its name: modules planted where commands work are not imported."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXT_ENCODER, Handmade
from planted import NAMES, environment, plant, plant_everywhere, traces

pytest.importorskip("onnx")
from hostile_engines import DECODER, DENOISER

from latentforge.measure.peers import PEERS
from latentforge.runtime import isolation
from latentforge.runtime.isolation import child_environment, program_command
from latentforge.runtime.kernels import compiler
from latentforge.runtime.telemetry import SWITCHES

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
BY_PYTHON = {"importlib", "contextlib", "runpy", "latentforge"}
"""Modules that ``python -m`` imports from the working directory before any of our code runs."""

CONSOLE = ("-c", "import sys\nsys.path.pop(0)\nfrom latentforge.__main__ import main\nmain()")
"""Console script, as pip writes it: its own folder is first on the path, here removed."""


def run(command: tuple[str, ...], folder: Path, **variables: str) -> str:
    """Run Python with arguments in a folder, and return its standard output."""
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with planted modules, and the file of their traces."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    plant(folder, tmp_path / "trace")
    return folder, tmp_path / "trace"


def compilation(engines: Path, target: Path) -> tuple[str, ...]:
    return ("compile", str(engines), str(target), "--backend", "onnxruntime")


def test_a_command_runs_nothing_of_the_working_directory(
    hostile: tuple[Path, Path], tiny_engines: Path, tmp_path: Path
) -> None:
    """compile starts a process for each engine."""
    folder, trace = hostile
    run((*CONSOLE, *compilation(tiny_engines, tmp_path / "out")), folder, PYTHONPATH=SOURCE)
    assert (tmp_path / "out" / "manifest.json").is_file() and traces(trace) == []


COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "engines", "a", "--steps", "1", "-o", "output/a.png"),
    "compile": ("compile", "engines", "output/out", "--backend", "onnxruntime"),
    "inspect": ("inspect", "engines", "--layers", "1", "--json", "output/a.json"),
}
SLOW: dict[str, tuple[str, ...]] = {
    "verify": ("verify", "engines"),
    "optimize": ("optimize", "engines", "output/out", "--steps", "1", "--gate", "images=1"),
    "eval": ("eval", "engines", "--against", "engines", "--images", "1", "--json", "output/e"),
    "bench": ("bench", "engines", "--steps", "1", "--repeats", "1", "--against", "eager"),
    "compiled": ("bench", "engines", "--steps", "1", "--repeats", "1", "--against", "compile"),
    "build": ("build", "checkpoint", "output/out", "--repeats", "0", "--gate", "images=1"),
}


def run_planted(arguments: tuple[str, ...], tmp_path: Path) -> list[str]:
    """Run a command where everything is planted in every folder that it names."""
    work, trace = tmp_path / "work", tmp_path / "trace"
    (work / "output").mkdir()
    plant_everywhere(work, trace)
    (work / "torchinductor_root").mkdir()
    run((*CONSOLE, *arguments), work, PYTHONPATH=SOURCE, TMPDIR=str(work))
    return traces(trace)


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_run_of_the_engines_and_beside_the_output(
    name: str, handmade: Handmade, tmp_path: Path
) -> None:
    parts = {"text_encoder": TEXT_ENCODER, "denoiser": DENOISER, "vae_decoder": DECODER}
    (tmp_path / "work").mkdir()
    handmade("work/engines", onnx=parts)
    assert run_planted(COMMANDS[name], tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_no_command_runs_what_is_planted(
    name: str, tiny_engines: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_engines, tmp_path / "work" / "engines")
    shutil.copytree(tiny_checkpoint, tmp_path / "work" / "checkpoint")
    assert run_planted(SLOW[name], tmp_path) == []


def test_planted_files_would_be_found(tmp_path: Path) -> None:
    plant_everywhere(tmp_path, tmp_path / "trace")
    with (tmp_path / "model.pkl").open("rb") as file:
        pickle.load(file)
    run(("-c", "import json, pipeline, torch"), tmp_path)
    found = traces(tmp_path / "trace")
    assert {"json", "torch"} <= set(found) and found.count(tmp_path.name) == 2


def test_neither_does_python_m_once_it_has_found_the_package(
    tmp_path: Path, tiny_engines: Path
) -> None:
    folder, trace = tmp_path / "hostile", tmp_path / "trace"
    folder.mkdir()
    plant(folder, trace, tuple(name for name in NAMES if name not in BY_PYTHON))
    command = ("-m", "latentforge", *compilation(tiny_engines, tmp_path / "out"))
    run(command, folder, PYTHONPATH=SOURCE)
    assert traces(trace) == []


@pytest.mark.parametrize("entry", ["", ".", "..", f"{os.pathsep}.{os.pathsep}"])
def test_entries_that_name_the_working_directory_are_left_out(entry: str, tmp_path: Path) -> None:
    """Python itself searches them until the command starts, so that only a late name is planted."""
    folder = tmp_path / "inner" if entry == ".." else tmp_path
    folder.mkdir(exist_ok=True)
    plant(tmp_path, tmp_path / "trace", ("logging", "msgspec", "argparse", "onnxruntime"))
    path = os.pathsep.join([SOURCE, entry])
    for start in (CONSOLE, ("-m", "latentforge")):
        run((*start, "inspect", "--help"), folder, PYTHONPATH=path)
    assert traces(tmp_path / "trace") == []


def test_the_package_is_found_through_a_relative_entry(tmp_path: Path) -> None:
    (tmp_path / "src").symlink_to(SOURCE)
    plant(tmp_path, tmp_path / "trace", ("json", "numpy"))
    command = ("-m", "latentforge", "inspect", "--help")
    assert "usage" in run(command, tmp_path, PYTHONPATH="src")
    assert traces(tmp_path / "trace") == []


def test_a_program_finds_its_neighbours_and_not_the_working_directory(
    hostile: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = hostile
    (tmp_path / "program.py").write_text("import neighbour\nprint(neighbour.NAME)")
    (tmp_path / "neighbour.py").write_text("import json, numpy, msgspec\nNAME = 'found'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(folder / "..") + "/no", SOURCE]))
    monkeypatch.chdir(folder)
    command = program_command(str(tmp_path / "program.py"), "argument")
    ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("found\n", "") and traces(trace) == []


def test_processes_of_a_process_are_isolated_too(
    hostile: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As are the compilers of torch.compile, which ``python -c`` starts."""
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 does not know PYTHONSAFEPATH")
    folder, trace = hostile
    body = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json, numpy'])"
    (tmp_path / "program.py").write_text(body)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "")
    subprocess.run(program_command(str(tmp_path / "program.py")), env=child_environment())
    assert traces(trace) == []


def test_a_process_runs_the_package_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one on the path, such as an installed version, is not imported."""
    plant(tmp_path, tmp_path / "trace", ("latentforge",))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = program_command("latentforge.runtime.compile.build_process")
    ended = subprocess.run(command, env=child_environment(), input="", capture_output=True)
    assert b"JSON" in ended.stderr + ended.stdout or b"truncated" in ended.stderr
    assert traces(tmp_path / "trace") == []


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_starts_through_the_launcher(name: str, tmp_path: Path) -> None:
    from latentforge.measure.peers import participant

    command = participant(name, tmp_path, python="/other/python").command
    assert command[0] == "/other/python" and command[1].endswith("launcher.py")


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_LIBRARY_PATH", "PATH"])
def test_variables_of_folders_lose_relative_entries(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, os.pathsep.join(["", "/one", ".", "lib/two", "/three", ""]))
    assert child_environment()[name] == os.pathsep.join(["/one", "/three"])


def test_a_compiler_in_the_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join(["", "."]))
    assert compiler.compiler() is None


def test_a_library_keeps_the_path_of_its_user(tmp_path: Path) -> None:
    """Only a command takes the working directory off the path; ``import latentforge`` does not."""
    (tmp_path / "mine.py").write_text("")
    run(("-c", "import latentforge, mine"), tmp_path, PYTHONPATH=SOURCE)


def test_installed_packages_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a command that is run in the folder of installed packages."""
    for folder in isolation._installed():
        if Path(folder).is_dir():
            monkeypatch.chdir(folder)
            monkeypatch.setattr(sys, "path", [*sys.path, folder])
            for key in ("PATH", "PYTHONPATH", "PYTHONSAFEPATH"):
                monkeypatch.setenv(key, os.environ.get(key, ""))
            isolation.leave_working_directory()
            assert folder in sys.path


# Telemetry

PRINT = """
import os, sys
{first}
import latentforge
print([os.environ[name] for name in {names!r}], sys.modules["openvino_telemetry"])
"""


def test_telemetry_is_off_in_every_process_that_imports_the_package(tmp_path: Path) -> None:
    program = PRINT.format(first="", names=list(SWITCHES))
    assert run(("-c", program), tmp_path, PYTHONPATH=SOURCE) == "['1', '1', '1', '1'] None\n"


def test_a_variable_that_the_user_has_set_stays(tmp_path: Path) -> None:
    program = PRINT.format(first="", names=["ORT_DISABLE_TELEMETRY"])
    output = run(("-c", program), tmp_path, PYTHONPATH=SOURCE, ORT_DISABLE_TELEMETRY="0")
    assert output == "['0'] None\n"
