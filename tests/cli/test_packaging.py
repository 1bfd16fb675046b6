"""Contents of the two wheels, and a run of the main one in an environment of its own."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from latentforge.export.checkpoint import open_checkpoint
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.kernels import compiler

ROOT = Path(__file__).parents[2]
LIBRARY = f"latentforge/runtime/kernels/{compiler.LIBRARY.name}"
KERNELS = {f"runtime/kernels/{path.name}" for path in compiler.FOLDER.glob("*.[ch]*")}
TRAINING = {f"train/demo/{n}.py" for n in ("__init__", "architecture", "optimizer", "train")}
"""Files of the repository that the wheel leaves out."""

SOURCES = ("export", "measure", "optimize", "runtime", "serve", "train", "src/latentforge")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main wheel, built from the sdist as an installer would."""
    target = tmp_path_factory.mktemp("dist")
    _build(ROOT, target)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def demo_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the demo checkpoint, built from its sdist."""
    target = tmp_path_factory.mktemp("demo")
    _build(ROOT / "demo", target)
    return next(target.glob("*.whl"))


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
    left_out = {"export/demo/README.md"} | TRAINING | (KERNELS if LIBRARY in files else set())
    assert left_out < tracked
    assert files - {LIBRARY} == {
        f"latentforge/{name.removeprefix('src/latentforge/')}" for name in tracked - left_out
    }
    assert _licenses(metadata) == {"LICENSE", "NOTICE"}


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 1.2e6


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
