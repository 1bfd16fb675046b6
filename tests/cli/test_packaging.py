"""Contents of the wheels, and a run in an environment of its own."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from latentforge.runtime.kernels import compiler

ROOT = Path(__file__).parents[2]
LIBRARY = f"latentforge/runtime/kernels/{compiler.LIBRARY.name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as an installer would."""
    target = tmp_path_factory.mktemp("dist")
    _build(ROOT, target)
    return next(target.glob("*.whl"))


def _build(source: Path, target: Path, *arguments: str, **variables: str) -> str:
    """Build a distribution, and return what was said."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run(
        [*command, *arguments, str(source)],
        check=True, capture_output=True, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.skipif(compiler.compiler() is None, reason="there is no C++ compiler")
def test_wheel_has_the_kernels_and_says_for_which_platform(wheel: Path) -> None:
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    assert re.search("-py3-none-(linux|macosx)_", wheel.name)


def test_wheel_without_a_compiler_is_of_every_platform(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    said = _build(source, tmp_path, "--wheel", CXX="false")
    assert "installed without its own kernels and runs on ONNX Runtime's: false failed" in said
    pure = next(tmp_path.glob("*.whl"))
    assert pure.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(pure).namelist()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard",
         "export", "optimize", "runtime", "src/latentforge"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    files = {name for name in known if (ROOT / name).is_file() and not name.endswith("ruff.toml")}
    expected = {f"latentforge/{name.removeprefix('src/latentforge/')}" for name in files}
    assert own - {LIBRARY} == expected
    assert sum(1 for name in names if name.endswith("licenses/NOTICE")) == 1


def test_wheel_is_small_enough(wheel: Path) -> None:
    assert wheel.stat().st_size < 40e6


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
