"""Contents of the three wheels, and commands of the main one where it is installed alone."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from latentforge.export.checkpoint import open_checkpoint
from latentforge.optimize.recipes import tomllib
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.kernels import compiler
from latentforge.runtime.version import __version__

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
LIBRARY = f"latentforge/runtime/kernels/{compiler.LIBRARY.name}"
KERNELS = {f"runtime/kernels/{path.name}" for path in compiler.FOLDER.glob("*.[ch]*")}
TORCH = ROOT / "distributions" / "torch"
TRAINING = {f"train/demo/{n}.py" for n in ("__init__", "architecture", "optimizer", "train")}
"""Files of the repository that the wheels leave out."""

SOURCES = ("measure", "optimize", "runtime", "serve", "src/latentforge")
TORCH_SOURCES = ("export", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main wheel, built from the sdist as an installer would."""
    target = tmp_path_factory.mktemp("dist")
    _build(ROOT, target)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def torch_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the rooms that need torch, built from its sdist."""
    target = tmp_path_factory.mktemp("torch")
    _build(TORCH, target)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def production(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the main wheel alone, beside the libraries of this one."""
    folder = tmp_path_factory.mktemp("production")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")  # a .pth there ends at this line
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


@pytest.fixture(scope="module")
def demo_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the demo checkpoint, built from its sdist."""
    target = tmp_path_factory.mktemp("demo")
    _build(ROOT / "demo", target)
    return next(target.glob("*.whl"))


def _installed(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run what an environment has installed, whatever this process has on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-W", "ignore", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=python.parents[1]
    )


def _build(source: Path, target: Path, *arguments: str, **variables: str) -> str:
    """Build a distribution, and return the output of the build."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run(
        [*command, *arguments, str(source)],
        check=True, capture_output=True, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    return done.stdout + done.stderr


def _tracked(*folders: str) -> set[str]:
    """Files below these folders of the repository that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    return {name for name in listed if (ROOT / name).is_file()}


def _contents(wheel: Path) -> tuple[set[str], set[str]]:
    """The package's files in a wheel, and those of its metadata folder."""
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    return names - metadata, metadata


def _licenses(metadata: set[str]) -> set[str]:
    return {name.rpartition("/")[2] for name in metadata if "/licenses/" in name}


@pytest.mark.skipif(compiler.compiler() is None, reason="there is no C++ compiler")
def test_wheel_has_the_kernels_and_names_their_platform(wheel: Path) -> None:
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    assert re.search("-py3-none-(linux|macosx)_", wheel.name)


def test_wheel_without_a_compiler_is_for_every_platform(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    output = _build(source, tmp_path, "--wheel", CXX="false")
    assert "installed without its own kernels and runs on ONNX Runtime's: false failed" in output
    pure = next(tmp_path.glob("*.whl"))
    assert pure.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(pure).namelist())
    assert LIBRARY not in names
    assert {f"latentforge/{name}" for name in KERNELS} <= names  # to be compiled later


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files, metadata = _contents(wheel)
    tracked = {name for name in _tracked(*SOURCES) if not name.endswith("ruff.toml")}
    left_out = KERNELS if LIBRARY in files else set()
    assert left_out < tracked
    assert files - {LIBRARY} == {
        f"latentforge/{name.removeprefix('src/latentforge/')}" for name in tracked - left_out
    }
    assert _licenses(metadata) == {"LICENSE", "NOTICE"}


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 1e6


def test_torch_wheel_holds_its_two_rooms_and_nothing_else(torch_wheel: Path) -> None:
    """Both sdist and wheel have the files that the links in distributions/torch lead to."""
    files, metadata = _contents(torch_wheel)
    tracked = {name for name in _tracked(*TORCH_SOURCES) if not name.endswith("ruff.toml")}
    left_out = {"export/demo/README.md"} | TRAINING
    assert left_out < tracked
    assert files == {f"latentforge/{name}" for name in tracked - left_out}
    assert _licenses(metadata) == {"LICENSE", "NOTICE"}
    assert torch_wheel.name.endswith("-py3-none-any.whl")


def test_wheels_share_the_package_and_no_file(wheel: Path, torch_wheel: Path) -> None:
    """Installed side by side they are one package, and removing one leaves the other whole."""
    main, torch = _contents(wheel)[0], _contents(torch_wheel)[0]
    assert main.isdisjoint(torch)
    assert {name.split("/")[1] for name in torch} == set(TORCH_SOURCES)
    assert "latentforge/__init__.py" in main


def test_distributions_have_one_version() -> None:
    """Those that share the package fit only in the same version, and ask for it."""
    main, torch = (folder / "pyproject.toml" for folder in (ROOT, TORCH))
    project = tomllib.loads(torch.read_text("utf-8"))["project"]
    extras = tomllib.loads(main.read_text("utf-8"))["project"]["optional-dependencies"]
    assert project["version"] == __version__
    assert f"latentforge[optimize,report]=={__version__}" in project["dependencies"]
    assert extras["export"] == [f"latentforge-torch=={__version__}"]
    assert (TORCH / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_help_of_every_command_needs_the_main_wheel_alone(production: Path) -> None:
    """So does what is said where a command needs the other one: one line with the extra."""
    program = """
        import contextlib, io, sys
        from importlib.util import find_spec
        import latentforge
        from latentforge.command_line import run
        from latentforge.commands import COMMANDS
        assert sys.prefix in latentforge.__file__, latentforge.__file__
        assert not find_spec("latentforge.export") and not find_spec("latentforge.train")
        for arguments in (["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                with contextlib.suppress(SystemExit):
                    run(arguments)
            assert "latentforge" in printed.getvalue(), arguments
        for arguments in ("build demo b", "export demo e", "demo d", "search demo s --speedup 2",
                          "distill demo s d --minutes 1"):
            with contextlib.redirect_stderr(io.StringIO()) as printed:
                status = run(arguments.split())
            line = printed.getvalue()
            assert status == 2 and line.count("\\n") == 1, (arguments, line)
            assert "pip install 'latentforge[export]'" in line, (arguments, line)
    """
    done = _installed(production, "-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr


def test_engines_are_optimized_timed_and_run_with_the_main_wheel_alone(
    production: Path, tiny_engines: Path, tmp_path: Path
) -> None:
    source, optimized, compiled = map(str, (tiny_engines, tmp_path / "o", tmp_path / "c"))
    results = str(tmp_path / "bench.json")
    timing = ("--steps", "1", "--repeats", "1", "--json", results)
    for arguments in (
        ("optimize", source, optimized, "--repeats", "0", "--steps", "1"),
        ("compile", optimized, compiled, "--backend", "onnxruntime"),
        ("bench", compiled, *timing),
        ("report", results, "-o", str(tmp_path / "report.html")),
        ("inspect", compiled),
        ("verify", compiled),
        ("run", compiled, "owl", "--steps", "1", "-o", str(tmp_path / "owl.png")),
    ):
        done = _installed(production, "-m", "latentforge", *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert (tmp_path / "owl.png").stat().st_size > 1000
    for arguments in (("bench", compiled, "--against", "eager"), ("eval", compiled)):
        done = _installed(production, "-m", "latentforge", *arguments)
        assert done.returncode == 2 and "pip install 'latentforge[export]'" in done.stderr


def test_demo_wheel_holds_the_checkpoint_and_nothing_else(demo_wheel: Path) -> None:
    files, metadata = _contents(demo_wheel)
    assert files == {name.removeprefix("demo/src/") for name in _tracked("demo/src")}
    assert "latentforge_demo/checkpoint/model_index.json" in files
    assert _licenses(metadata) == {"LICENSE", "NOTICE"}
    assert demo_wheel.name.endswith("-py3-none-any.whl")
    assert demo_wheel.stat().st_size < 32e6


def test_demo_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory named demo, or latentforge_demo, in the working directory never stands in."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model_index.json").write_text("{}")
    (tmp_path / "latentforge_demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "latentforge_demo", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "latentforge.export.demo", raising=False)
    with pytest.raises(CheckpointError, match=r"pip install latentforge-demo.*pip install \./demo"):
        open_checkpoint("demo")


def test_all_but_the_demo_runs_without_its_package() -> None:
    modules = ("build", "evaluate", "benchmark", "export.stage", "export.reference.eager")
    imports = ", ".join(f"latentforge.{module}" for module in modules)
    blocked = f"import sys; sys.modules['latentforge_demo'] = None; import {imports}"
    command = "from latentforge.__main__ import main; sys.exit(main(['demo', 'never']))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{blocked}; {command}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install latentforge-demo" in done.stderr and done.stderr.count("\n") == 1
    assert not Path("never").exists()


def test_the_demo_package_needs_only_the_standard_library() -> None:
    spec = importlib.util.find_spec("latentforge_demo")
    assert spec is not None and spec.origin is not None
    code = f"import sys; sys.path.insert(0, {str(Path(spec.origin).parents[1])!r})\n"
    code += "import latentforge_demo as demo\nassert (demo.CHECKPOINT / 'unet').is_dir()\n"
    code += "assert len(demo.prompts(3, seed=0)) == 3"
    subprocess.run([sys.executable, "-S", "-E", "-c", code], check=True)


@pytest.mark.slow
def test_wheel_runs_alone_without_torch(wheel: Path, demo_engines: Path, tmp_path: Path) -> None:
    """A bare environment with the cpu extra makes an image of the demo engines."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    install = [str(python), "-m", "pip", "install", "--quiet", *constraints, f"{wheel}[cpu]"]
    subprocess.run(install, check=True)
    run = [str(python), "-m", "latentforge", "run", str(demo_engines), "owl", "-o", "owl.png"]
    subprocess.run(run, check=True, cwd=tmp_path)
    assert (tmp_path / "owl.png").stat().st_size > 1000
    listed = subprocess.run(
        [str(python), "-m", "pip", "list"], check=True, capture_output=True, text=True
    ).stdout.lower()
    assert "onnxruntime" in listed
    assert not any(name in listed for name in ("torch", "diffusers", "transformers"))
