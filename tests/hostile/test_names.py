"""No name in an engine directory becomes a path, whatever command reads it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Handmade

from latentforge.__main__ import main
from latentforge.runtime.errors import LatentforgeError
from latentforge.runtime.loader import load

NAMES = (
    *(
        "../../x",
        "/abs/x",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "C:x",
        "con",
        "nul",
        "aux",
        "com1",
        "lpt9",
    ),
    *(
        "con.onnx",
        "NUL",
        "x\0y",
        "x" * 300,
        "denoisér",
        "dеnoiser",
        "de\u200bnoiser",
        "ﬁle",
        "file ",
    ),
    *(
        "file.",
        "~",
        "~root",
        "$HOME",
        "-o",
        "--help",
        "*",
        "?",
        "\u202e",
        "\x1b[2J",
        "\ud800",
        "\n",
    ),
)
"""Names that are paths, devices, options or patterns, and some that only look like others."""

Content = dict[str, Any]


def rename(group: Content, name: str) -> None:
    key = next(iter(group))
    group[name] = group.pop(key)


PLACES: dict[str, Callable[[Content, str], None]] = {
    "a component": lambda tree, name: rename(tree["components"], name),
    "a further component": lambda tree, name: tree["components"].update(
        {name: tree["components"]["denoiser"]}
    ),
    "a tokenizer": lambda tree, name: rename(tree["tokenizers"], name),
    "an encoder's component": lambda tree, name: encoder(tree).update(component=name),
    "an encoder's tokenizer": lambda tree, name: encoder(tree).update(tokenizer=name),
    "a component's file": lambda tree, name: tree["components"]["denoiser"].update(file=name),
    "a tokenizer's file": lambda tree, name: tree["tokenizers"]["tokenizer"].update(file=name),
    "a file of weights": lambda tree, name: tree["components"]["denoiser"].update(
        data=[{"file": name, "sha256": "0" * 64, "bytes": 4}]
    ),
    "a folder of weights": lambda tree, name: tree["components"]["denoiser"].update(
        data=[{"file": f"{name}/w", "sha256": "0" * 64, "bytes": 4}]
    ),
    "a backend": lambda tree, name: tree["components"]["denoiser"].update(backend=name),
    "a sampler": lambda tree, name: tree["defaults"].update(sampler=name),
}
"""Places whose names a command looks up or opens."""

TEXTS: dict[str, Callable[[Content, str], None]] = {
    "the model": lambda tree, name: tree.update(name=name),
    "the family": lambda tree, name: tree.update(family=name),
    "the checkpoint": lambda tree, name: tree["source"].update(checkpoint=name, license=name),
    "a stage": lambda tree, name: tree.update(history=[stage(name)]),
    "a stage's option": lambda tree, name: tree.update(history=[stage("export", {name: name})]),
    "a pass": lambda tree, name: tree.update(history=[stage("x", passes={name: 1})]),
    "a tool": lambda tree, name: tree.update(history=[stage("x", tools={name: name})]),
    "a figure": lambda tree, name: tree.update(quality={name: {name: 1.0}}),
    "a precision": lambda tree, name: tree["components"]["denoiser"].update(precision=name),
}
"""Places whose names are only printed."""


def encoder(tree: Content) -> Content:
    found: Content = tree["conditioning"]["encoders"][0]
    return found


def stage(name: str, options: Content | None = None, **further: Any) -> Content:
    return {"name": name, "options": options or {}, "tools": {}, "seconds": 1.0, **further}


COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "ENGINES", "a cat", "-o", "TARGET/a.png"),
    "refine": ("run", "GOOD", "a cat", "-o", "TARGET/a.png", "--refiner", "ENGINES"),
    "bench": ("bench", "ENGINES", "--json", "TARGET/a.json", "--repeats", "1"),
    "against": ("bench", "GOOD", "ENGINES", "--json", "TARGET/a.json", "--repeats", "1"),
    "eval": ("eval", "ENGINES", "--images", "1", "--json", "TARGET/a.json", "--keep", "TARGET/k"),
    "compile": ("compile", "ENGINES", "TARGET/made", "--backend", "onnxruntime"),
    "optimize": ("optimize", "ENGINES", "TARGET/made"),
    "inspect": ("inspect", "ENGINES", "--json", "TARGET/a.json"),
    "verify": ("verify", "ENGINES"),
    "build": ("build", "ENGINES", "TARGET/made"),
    "export": ("export", "ENGINES", "TARGET/made"),
}


@pytest.fixture
def place(handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with good engines and a target, in which nothing else may appear."""
    handmade("good")
    handmade("engines")
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path


def damage(engines: Path, change: Callable[[Content, str], None], name: str) -> None:
    path = engines / "manifest.json"
    tree = msgspec.json.decode(path.read_bytes())
    change(tree, name)
    path.write_bytes(json.dumps(tree).encode())


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# An unknown backend is printed by inspect, and found by the processes of bench and eval.
PAIRS = [
    (command, where)
    for command in COMMANDS
    for where in PLACES
    if where != "a backend" or command not in ("bench", "against", "eval", "inspect")
]


@pytest.mark.parametrize(("command", "where"), PAIRS)
def test_commands_refuse_names(
    place: Path, command: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx_ir")
    words = {"ENGINES": str(place / "engines"), "GOOD": str(place / "good")}
    arguments = [
        words.get(word, word.replace("TARGET", str(place / "target"))) for word in COMMANDS[command]
    ]
    original, before = (place / "engines/manifest.json").read_bytes(), listed(place)
    first = [*PLACES].index(where) + 5 * [*COMMANDS].index(command)
    for name in NAMES[first % 13 :: 13]:  # three of them; all, over the places of a command
        (place / "engines/manifest.json").write_bytes(original)
        damage(place / "engines", PLACES[where], name)
        status = main(arguments)
        *progress, error = capsys.readouterr().err.splitlines()
        assert status == 2 and error.startswith("latentforge: ") and error.isprintable(), name
        assert all(line.isprintable() for line in progress), name
        assert listed(place) == before, name


@pytest.mark.parametrize("where", PLACES)
def test_every_name_is_refused(place: Path, where: str) -> None:
    original = (place / "engines/manifest.json").read_bytes()
    for name in NAMES:
        (place / "engines/manifest.json").write_bytes(original)
        damage(place / "engines", PLACES[where], name)
        with pytest.raises(LatentforgeError) as caught:
            load(place / "engines")
        assert str(caught.value).isprintable(), name


@pytest.mark.parametrize("where", TEXTS)
def test_texts_are_printed_or_refused(
    place: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    original, before = (place / "engines/manifest.json").read_bytes(), listed(place)
    for name in NAMES[[*TEXTS].index(where) % 3 :: 3]:
        (place / "engines/manifest.json").write_bytes(original)
        damage(place / "engines", TEXTS[where], name)
        status = main(["inspect", str(place / "engines")])
        output, error = capsys.readouterr()
        assert status in (0, 2) and (output + error).replace("\n", "").isprintable(), name
        assert listed(place) == before, name
