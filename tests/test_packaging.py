"""What is in the wheel, and that it runs in an environment of its own."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as an installer would."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(target.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "export", "optimize", "runtime"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    expected = {f"latentforge/{name}" for name in tracked if not name.endswith("ruff.toml")}
    front = [path for path in (ROOT / "src" / "latentforge").iterdir() if path.is_file()]
    expected |= {f"latentforge/{path.name}" for path in front}
    assert own >= expected
    assert {name for name in own - expected if not _scratch(name)} == set()
    assert sum(1 for name in names if name.endswith("licenses/NOTICE")) == 1


def _scratch(name: str) -> bool:
    """Files not yet committed, in a working tree; a clean clone has none."""
    path = ROOT / name.removeprefix("latentforge/")
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return status.startswith("??")


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
