"""Progress lines where there is no terminal: parts, their insides, and never a long silence."""

import re
import time

import pytest

from latentforge.runtime import progress as module
from latentforge.runtime.progress import Progress


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK", 0.01)
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.05)


@pytest.mark.usefixtures("talkative")
def test_a_silent_part_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    with Progress(2, quiet=False) as progress:
        progress.expect(6e6)
        with progress.part("unet: compile"):
            time.sleep(0.2)
            written = until_a_line(capsys)
    elapsed = time.perf_counter() - start
    first, *others, last = (written + capsys.readouterr().err).splitlines()
    assert re.fullmatch(
        r"\[1/2\] unet: compile, still running after \d+ s; 1666h\d\dm left in all", first
    )
    assert len(others) <= elapsed / 0.05
    assert 0.2 <= seconds_of(last, "[1/2] unet: compile") <= round(elapsed, 1)


def until_a_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, as soon as it is a line: the thread may be late."""
    written = ""
    while "\n" not in written:
        time.sleep(0.01)
        written += capsys.readouterr().err
    return written


def seconds_of(line: str, part: str) -> float:
    """Return the seconds that a line says a part took."""
    found = re.fullmatch(rf"{re.escape(part)} \((\d+\.\d) s\)", line)
    assert found, line
    return float(found[1])


def test_steps_have_their_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=False) as progress, progress.part("reference"):
        time.sleep(0.02)
        progress.within("step", 1, 30001)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/1] reference: step 1/30001, ") and "m left, still" in lines[0]


def test_counting_within_a_part_has_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=False) as progress, progress.part("errors"):
        progress.count_within(1, 3)
    assert capsys.readouterr().err.startswith("[1/1] errors: errors 1/3, ")


def test_parts_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=False) as progress, progress.part("timing"):
        with (inner := progress.inner(2)).part("input: load"):
            pass
        with pytest.raises(ValueError, match="no"), inner.part("input: image"):
            raise ValueError("no")
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    shown = [f"[1/1] timing: input: {text}" for text in ("load 0/2", "load 1/2", "image 1/2")]
    assert lines[:-1] == shown and seconds_of(lines[-1], "[1/1] timing") < 60


@pytest.mark.usefixtures("talkative")
def test_quiet_starts_no_thread_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress, progress.part("quiet"):
        progress.within("step", 1, 2)
        time.sleep(0.1)
    assert capsys.readouterr().err == "" and progress._pulse is None


@pytest.mark.usefixtures("talkative")
def test_no_line_after_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=False) as progress:
        with progress.part("done"):
            pass
        capsys.readouterr()
        time.sleep(0.1)
    assert capsys.readouterr().err == "" and not progress._pulse._thread.is_alive()  # type: ignore[union-attr]
