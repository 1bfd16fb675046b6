"""Engines whose run or load never ends: Ctrl-C and SIGTERM end the command all the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TEXT_ENCODER, Handmade
from planted import environment

pytest.importorskip("onnx")
from hostile_engines import DECODER, DENOISER

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
SECONDS = 10.0
"""Most seconds from a signal to the end of the process."""

BUSY = 2.0
"""Seconds of processor time that no command takes to start."""

HEADER = DENOISER.partition("<float half")[0]
CHAIN = "\n".join(f"m{i + 1} = MatMul(m{i}, m{i})" for i in range(2000))
COMPUTED = f"""{HEADER}
<int64[2] size = {{3000, 3000}}>
{{
  mean = ReduceMean<keepdims = 0>(sample)
  m0 = Expand(mean, size)
  {CHAIN}
  sum = ReduceSum<keepdims = 0>(m2000)
  out_sample = Add(sample, sum)
}}"""
"""Denoiser whose run takes hours; graphs with endless loops are refused."""

FOLDED = f"""{HEADER}
<int64[2] size = {{3000, 3000}}>
{{
  m0 = ConstantOfShape<value = float[1] {{0.001}}>(size)
  {CHAIN}
  sum = ReduceSum<keepdims = 0>(m2000)
  out_sample = Add(sample, sum)
}}"""
"""Denoiser with hours of constant folding when it is loaded."""


class Command:
    """Running command, with a log and a temporary folder of its own."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.work, self.temporary, self.log = folder / "work", folder / "tmp", folder / "log"
        self.work.mkdir()
        self.temporary.mkdir()
        variables = environment(PYTHONPATH=SOURCE, TMPDIR=str(self.temporary))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "latentforge", *map(str, arguments)],
                cwd=self.work,
                env=variables,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def wait_for_loop(self) -> set[int]:
        """Wait until a process has computed for longer than it takes to start; return them all."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            family = descendants(self.process.pid)
            if any(processor_seconds(pid) > BUSY for pid in family):
                return family
            time.sleep(0.1)
        raise AssertionError(f"nothing computes: {self.log.read_text()}")

    def interrupt(self, *numbers: signal.Signals) -> tuple[int, float]:
        """Send signals, a second apart; return the exit status, and the seconds to the end."""
        start = time.monotonic()
        for place, number in enumerate(numbers):
            if place:
                time.sleep(1)
            self.process.send_signal(number)
        return self.process.wait(30), time.monotonic() - start

    def lines(self) -> list[str]:
        """Return the messages on standard error, without lines of progress and of plans."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if line.startswith(("latentforge:", "Traceback"))]


def descendants(pid: int) -> set[int]:
    """Return a process and those that it has started, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alive(pids: set[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def check(command: Command, *numbers: signal.Signals) -> float:
    """Interrupt a command that never ends, check how it ends, and return after which time."""
    family = command.wait_for_loop()
    try:
        status, seconds = command.interrupt(*numbers)
    finally:
        command.process.kill()
    by = " by SIGTERM" if numbers[0] == signal.SIGTERM else ""
    assert command.lines() == [f"latentforge: interrupted{by}; nothing was left behind"]
    assert status == 130 and seconds < SECONDS
    assert alive(family) == []
    assert [*command.work.iterdir(), *command.temporary.iterdir()] == []
    return seconds


@pytest.fixture
def engines(handmade: Handmade) -> Callable[[str], Path]:
    """A function that writes engines with a denoiser."""

    def written(denoiser: str) -> Path:
        parts = {"text_encoder": TEXT_ENCODER, "denoiser": denoiser, "vae_decoder": DECODER}
        return handmade("endless", onnx=parts)

    return written


Engines = Callable[[str], Path]


def test_run_ends_within_seconds_of_ctrl_c(engines: Engines, tmp_path: Path) -> None:
    check(Command(tmp_path, "run", engines(COMPUTED), "a", "-o", "a.png"), signal.SIGINT)


def test_bench_ends_its_participants(engines: Engines, tmp_path: Path) -> None:
    check(Command(tmp_path, "bench", engines(COMPUTED), "--json", "b.json"), signal.SIGTERM)


OTHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run while it loads": (FOLDED, ("run", "ENGINES", "a", "-o", "a.png")),
    "compile while it compares": (
        COMPUTED,
        ("compile", "ENGINES", "out", "--backend", "onnxruntime"),
    ),
    "compile for OpenVINO": (COMPUTED, ("compile", "ENGINES", "out/a/b", "--backend", "openvino")),
    "compile in a child": (FOLDED, ("compile", "ENGINES", "out", "--backend", "onnxruntime")),
    "optimize": (COMPUTED, ("optimize", "ENGINES", "out", "--steps", "2")),
    "inspect": (COMPUTED, ("inspect", "ENGINES", "--layers", "3")),
    "eval": (COMPUTED, ("eval", "ENGINES", "--against", "ENGINES")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_command_ends(name: str, engines: Engines, tmp_path: Path) -> None:
    denoiser, arguments = OTHERS[name]
    path = str(engines(denoiser))
    command = Command(tmp_path, *(path if word == "ENGINES" else word for word in arguments))
    check(command, signal.SIGINT)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(engines: Engines, tmp_path: Path) -> None:
    command = Command(tmp_path, "run", engines(COMPUTED), "a", "-o", "a.png")
    assert check(command, signal.SIGTERM, signal.SIGTERM) < 4


@pytest.mark.slow
def test_two_signals_of_one_cause_count_once(engines: Engines, tmp_path: Path) -> None:
    """``timeout`` sends its signal to the command, and to the group of the command."""
    command = Command(tmp_path, "run", engines(COMPUTED), "a", "-o", "a.png")
    command.wait_for_loop()
    command.process.send_signal(signal.SIGTERM)
    assert check(command, signal.SIGTERM) > 4
