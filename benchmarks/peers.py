"""Environments of the peers, benchmarks against all of them, and tables in Markdown.

    python benchmarks/peers.py env
    python benchmarks/peers.py bench CHECKPOINT ENGINES... --json results.json --html results.html
    python benchmarks/peers.py table results.json

Environments are created in .venv-peers, and again after their list of requirements has changed.
``bench`` passes its options on to ``latentforge bench``.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from latentforge.measure.conclusion import interval_text, runs_caveat
from latentforge.measure.peers import PEERS
from latentforge.measure.results import BenchResult, Results
from latentforge.runtime.image import MAX_PSNR

__all__ = ["ENVIRONMENTS", "environment", "main", "table"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-peers"
_REQUIREMENTS = ROOT / "benchmarks" / "environments"

ENVIRONMENTS: Mapping[str, Path] = {
    "optimum-ort": ROOT / "tests" / "optimum_onnx" / "requirements.txt",
    "optimum-openvino": _REQUIREMENTS / "openvino.txt",
    "openvino-genai": _REQUIREMENTS / "openvino.txt",
    "sd-cpp": _REQUIREMENTS / "sd-cpp.txt",
}
"""Requirements of the peers that need their own environment; equal lists share one."""


def environment(requirements: Path, folder: Path = FOLDER) -> Path:
    """Return the interpreter of the environment with a list of requirements; create it if needed.

    A copy of the list is written last, so that an interrupted creation is continued.
    """
    directory = folder / _name(requirements)
    python, record = directory / "bin" / "python", directory / "requirements.txt"
    required = requirements.read_text()
    if record.is_file() and record.read_text() == required:
        return python
    print(f"creating {directory}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    install = ["-m", "pip", "install", "--disable-pip-version-check", "-r", requirements]
    # pip would take a library from its cache that was compiled with other settings.
    anew = ["--no-cache-dir"] if "--config-settings" in required else []
    subprocess.run([python, *install, *anew], check=True)
    record.write_text(required)
    return python


def _name(requirements: Path) -> str:
    """Return the folder's name for a requirements.txt, and the file's for any other list."""
    path = requirements.parent if requirements.stem == "requirements" else requirements
    return path.stem.replace("_", "-")


def create_all(folder: Path = FOLDER) -> dict[str, Path]:
    """Create all environments and return the interpreter of each peer that has one."""
    return {name: environment(path, folder) for name, path in ENVIRONMENTS.items()}


def bench(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """Run ``latentforge bench`` against all peers.

    Args:
        arguments: CHECKPOINT ENGINES... and options of ``latentforge bench``.
        folder: of the environments.

    Returns:
        Its exit status.
    """
    environments = create_all(folder).items()
    pythons = [f"--python={name}={os.path.relpath(python)}" for name, python in environments]
    checkpoint, *rest = arguments
    against = ["--against", ",".join(PEERS), "--checkpoint", checkpoint]
    command = [sys.executable, "-m", "latentforge", "bench", *rest, *against, *pythons]
    return subprocess.run(command).returncode


COLUMNS: Mapping[str, Callable[[BenchResult], str]] = {
    "": lambda entry: entry.name,
    "precision": lambda entry: entry.precision,
    "image, s": lambda entry: _seconds(entry, "total"),
    "text, s": lambda entry: _seconds(entry, "text_encoder"),
    "step, s": lambda entry: _seconds(entry, "denoiser step"),
    "VAE, s": lambda entry: _seconds(entry, "vae_decoder"),
    "speedup (interval)": lambda entry: _speedup(entry),
    "peak memory": lambda entry: _gigabytes(entry.peak_memory),
    "files": lambda entry: _gigabytes(entry.file_bytes),
    "PSNR, dB": lambda entry: _decibels(entry),
}
"""Columns of a table, with the text of a result's cell."""


def table(results: Results) -> str:
    """Return results as Markdown, with separate tables for class A and class B."""
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    ran = [entry for entry in results.entries if entry.status == "ok"]
    same = [entry for entry in ran if entry.role == "reference" or entry.speed_class == "A"]
    different = [entry for entry in ran if entry not in same]
    yield from _rows(same)
    if different:
        yield from ("", "Class B, images that differ from the reference's:", "", *_rows(different))
    if caveat := runs_caveat(results):
        yield from ("", f"Speedups: {caveat}.")
    for entry in results.entries:
        if entry.status != "ok":
            yield from ("", f"{entry.name}: {entry.status}: {entry.message}")


def _rows(entries: Sequence[BenchResult]) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for entry in sorted(entries, key=lambda entry: entry.relative_time):
        yield f"| {' | '.join(show(entry) for show in COLUMNS.values())} |"


def _seconds(entry: BenchResult, stage: str) -> str:
    return f"{entry.median[stage]:.3g}" if stage in entry.median else ""


def _speedup(entry: BenchResult) -> str:
    speedup = entry.ratio.get("total")
    if speedup is None or entry.role == "reference":
        return ""
    interval = interval_text(speedup)
    return f"{speedup.value:.2f}×" + (f" ({interval})" if interval else "")


def _decibels(entry: BenchResult) -> str:
    if entry.role == "reference":
        return "reference"
    if entry.psnr is None:
        return ""
    return "identical" if entry.psnr >= MAX_PSNR else f"{entry.psnr:.1f}"


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def main() -> int:
    """Create the environments, run a benchmark, or print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("env", help="create the environments")
    command.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="DIR")
    commands.add_parser(
        "bench",
        help="benchmark against all peers: CHECKPOINT ENGINES... [options of latentforge bench]",
    )
    command = commands.add_parser("table", help="print a result file as Markdown")
    command.add_argument("results", type=Path, metavar="RESULTS")
    options, rest = parser.parse_known_args()
    if rest and options.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    match options.command:
        case "env":
            for name, python in create_all(options.folder).items():
                print(f"{name}={python}")
        case "bench":
            return bench(rest) if rest else parser.error("bench needs CHECKPOINT ENGINES...")
        case "table":
            print(table(Results.read(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
