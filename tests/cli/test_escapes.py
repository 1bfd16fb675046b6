"""Nothing that a file says controls the terminal, adds a line, or fails to be printed."""

import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Handmade

from latentforge.commands.describe import describe
from latentforge.commands.output import EscapedStream, escaped_output
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import Manifest, Stage, WeightSource
from latentforge.runtime.progress import Progress
from latentforge.runtime.record import escaped
from latentforge.runtime.text import printable

HOSTILE = (
    *("\x1b[31m", "\x1b]0;title\x07", "\x9b31m", "\r", "\x08", "\x7f", "\u202e", "\u2066"),
    *("\u200b", "\ufeff", "\u2028", "\ud800", "\x00", "a\nok  forged", "\x85"),
)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, **environment}
    line = [sys.executable, "-m", "latentforge", *arguments]
    return subprocess.run(line, capture_output=True, env=variables, check=False)


def is_safe(text: str) -> bool:
    """Return True if a terminal only shows the text, apart from line ends and tabs."""
    return all(c in "\n\t" or unicodedata.category(c)[0] not in "CZ" or c == " " for c in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and shown != text
    assert shown.encode("ascii", "backslashreplace")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_stream(text: str, encoding: str) -> None:
    raw = io.BytesIO()
    inner = io.TextIOWrapper(raw, encoding, newline="")
    stream: Any = EscapedStream(inner)
    print(f"é {text} end", file=stream)
    inner.flush()
    shown = raw.getvalue().decode(encoding)
    assert is_safe(shown) and shown.endswith(" end\n")


def test_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with escaped_output():
        print("a\x1b[31m")
        print("b\x9b", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("a\\x1b[31m\n", "b\\x9b\n")


def hostile(handmade: Handmade, text: str) -> Path:
    stage = Stage(
        name=text,
        options={"recipe": text, "target": text},
        tools={text: text},
        seconds=0,
        passes={text: 1},
    )
    source = WeightSource(checkpoint=text, sha256={text: "0" * 64}, license=text)
    return handmade(history=(stage,), source=source, family=text)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text != "\ud800"])
def test_a_description_has_the_lines_of_a_harmless_one(handmade: Handmade, text: str) -> None:
    manifest = Manifest.read(hostile(handmade, text))
    shown = describe(manifest)
    assert is_safe(shown)
    harmless = msgspec.json.decode(
        msgspec.json.encode(manifest).replace(msgspec.json.encode(text)[1:-1], b"x"), type=Manifest
    )
    assert shown.count("\n") == describe(harmless).count("\n")


@pytest.mark.parametrize("environment", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
@pytest.mark.parametrize("name", ["inspect", "verify", "missing", "compile"])
def test_commands(handmade: Handmade, name: str, environment: dict[str, str]) -> None:
    engines = hostile(handmade, "ü\x1b[31m\u202e\x9b\nforged")
    more = ("target", "--backend", "onnxruntime", "--dry-run") if name == "compile" else ()
    if name == "missing":
        (engines / "denoiser.onnx").unlink()
        content = json.loads((engines / "manifest.json").read_text())
        content["components"]["denoiser"]["backend"] = "\x1b[31m\nforged"
        (engines / "manifest.json").write_text(json.dumps(content))
        name = "verify"
    result = command(name, str(engines), *more, **{"PYTHONIOENCODING": "", **environment})
    text = (result.stdout + result.stderr).decode()
    assert text and is_safe(text) and "Traceback" not in text
    assert not any(line.startswith("forged") for line in text.splitlines())


def test_messages_of_a_log_stand_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from latentforge.command_line import _OneLine

    record = logging.LogRecord("x", logging.WARNING, "", 0, "a %s", ("\x1b[31m\nb",), None)
    assert _OneLine("latentforge: %(message)s").format(record) == "latentforge: a \\x1b[31m b"


@pytest.mark.parametrize("text", HOSTILE)
def test_loggers_escape_for_programs_of_others(text: str, caplog: pytest.LogCaptureFixture) -> None:
    escaping_logger("latentforge.test").warning("a %s of %d", text, 3)
    escaping_logger("latentforge.test").warning("%")
    first, second = caplog.messages
    assert is_safe(first) and first.startswith("a ") and first.endswith(" of 3")
    assert "\n" not in first and second == "%"


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, quiet=False) as progress:
        with progress.part("\x1b[31m\na"):
            progress.note("\x9b\nb")
    shown = capsys.readouterr().err
    assert is_safe(shown) and shown.count("\n") == 2


def test_an_escaped_record_is_of_the_same_type(handmade: Handmade) -> None:
    manifest = Manifest.read(handmade())
    assert escaped(manifest) == manifest
