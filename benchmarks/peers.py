"""The peers that our engines are measured against: their environments, and the README's table.

    python benchmarks/peers.py env
    python benchmarks/peers.py bench CHECKPOINT ENGINES... --json results.json --html results.html
    python benchmarks/peers.py table results.json

An environment is made once, in .venv-peers, and made again where its list of requirements has
changed. What ``bench`` doesn't know it hands on to ``latentforge bench``.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from latentforge.measure.peers import PEERS
from latentforge.measure.results import BenchResult, Results
from latentforge.runtime.image import MAX_PSNR

__all__ = ["ENVIRONMENTS", "environment", "main", "table"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-peers"
_OWN = ROOT / "benchmarks" / "environments"

ENVIRONMENTS: Mapping[str, Path] = {
    "optimum-ort": ROOT / "tests" / "optimum_onnx" / "requirements.txt",
    "optimum-openvino": _OWN / "openvino.txt",
    "openvino-genai": _OWN / "openvino.txt",
    "sd-cpp": _OWN / "sd-cpp.txt",
}
"""What pip installs for the peers that can't share ours; one environment for each list."""


def environment(requirements: Path, folder: Path = FOLDER) -> Path:
    """The interpreter of an environment with a list of requirements, made now if need be.

    The list is noted in it last of all, so that one whose making was interrupted goes on.
    """
    place = folder / _name(requirements)
    python, note = place / "bin" / "python", place / "requirements.txt"
    wanted = requirements.read_text()
    if note.is_file() and note.read_text() == wanted:
        return python
    print(f"making {place}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = ["-m", "pip", "install", "--disable-pip-version-check", "-r", requirements]
    subprocess.run([python, *install], check=True)
    note.write_text(wanted)
    return python


def _name(requirements: Path) -> str:
    """optimum_onnx/requirements.txt is called after its folder, and openvino.txt openvino."""
    named = requirements.parent if requirements.stem == "requirements" else requirements
    return named.stem.replace("_", "-")


def make(folder: Path = FOLDER) -> dict[str, Path]:
    """Make every environment and tell the interpreter of each peer that needs one."""
    return {name: environment(path, folder) for name, path in ENVIRONMENTS.items()}


def bench(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """Run ``latentforge bench`` against every peer: CHECKPOINT ENGINES... and its own options."""
    made = {name: os.path.relpath(python) for name, python in make(folder).items()}
    pythons = [f"--python={name}={python}" for name, python in made.items()]
    checkpoint, *rest = arguments
    against = ["--against", ",".join(PEERS), "--checkpoint", checkpoint]
    command = [sys.executable, "-m", "latentforge", "bench", *rest, *against, *pythons]
    return subprocess.run(command).returncode


COLUMNS: Mapping[str, Callable[[BenchResult], str]] = {
    "": lambda entry: entry.name,
    "computes in": lambda entry: entry.precision,
    "image, s": lambda entry: _seconds(entry, "total"),
    "text, s": lambda entry: _seconds(entry, "text_encoder"),
    "UNet step, s": lambda entry: _seconds(entry, "denoiser step"),
    "VAE, s": lambda entry: _seconds(entry, "vae_decoder"),
    "speed (95 %)": lambda entry: _speed(entry),
    "peak memory": lambda entry: _gigabytes(entry.peak_memory),
    "files": lambda entry: _gigabytes(entry.file_bytes),
    "PSNR, dB": lambda entry: _decibels(entry),
}
"""The columns of a table, and what each says of an entry."""


def table(results: Results) -> str:
    """What was measured as Markdown.

    Class A draws the reference's pictures and class B draws others: they never share a table.
    """
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    ran = [entry for entry in results.entries if entry.status == "ok"]
    same = [entry for entry in ran if entry.role == "reference" or entry.speed_class == "A"]
    others = [entry for entry in ran if entry not in same]
    yield from _rows(same)
    if others:
        yield from ("", "Other pictures than the reference's:", "", *_rows(others))
    for entry in results.entries:
        if entry.status != "ok":
            yield from ("", f"{entry.name}: {entry.status}: {entry.message}")


def _rows(entries: Sequence[BenchResult]) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for entry in sorted(entries, key=lambda entry: entry.slowness):
        yield f"| {' | '.join(show(entry) for show in COLUMNS.values())} |"


def _seconds(entry: BenchResult, stage: str) -> str:
    return f"{entry.median[stage]:.3g}" if stage in entry.median else ""


def _speed(entry: BenchResult) -> str:
    ratio = entry.ratio.get("total")
    if ratio is None or entry.role == "reference":
        return "1" if entry.role == "reference" else ""
    bounds = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{ratio.value:.2f}×{bounds}"


def _decibels(entry: BenchResult) -> str:
    if entry.psnr is None or entry.role == "reference":
        return ""
    return "identical" if entry.psnr >= MAX_PSNR else f"{entry.psnr:.1f}"


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def main() -> int:
    """Make the environments, measure, or print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    added = commands.add_parser("env", help="make the environments, or go on making them")
    added.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="DIR")
    commands.add_parser("bench", help="CHECKPOINT ENGINES... and options of latentforge bench")
    added = commands.add_parser("table", help="what was measured, as Markdown")
    added.add_argument("results", type=Path, metavar="RESULTS")
    given, rest = parser.parse_known_args()
    if rest and given.command != "bench":
        parser.error(f"unknown: {' '.join(rest)}")
    match given.command:
        case "env":
            for name, python in make(given.folder).items():
                print(f"{name}={python}")
        case "bench":
            return bench(rest) if rest else parser.error("bench takes CHECKPOINT ENGINES...")
        case "table":
            print(table(Results.read(given.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
