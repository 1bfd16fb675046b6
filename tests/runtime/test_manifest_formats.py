"""Directories of other manifest formats are refused with the command that builds them anew."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import FORMAT, Manifest

Tree = dict[str, Any]

# The keys of a format 1 manifest that the message is made from, and some that it ignores.
OLD: Tree = {
    "format": 1,
    "name": "stable-diffusion-v1-5",
    "family": "stable_diffusion",
    "source": {"checkpoint": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sha256": {}},
    "components": {"unet": {"file": "unet.onnx"}},
    "fast": None,
    "history": [
        {"name": "export", "options": {"opset": 20}, "tools": {}, "seconds": 60.0},
        {
            "name": "optimize",
            "options": {"recipe": "int8", "target": "openvino", "settings": {}},
            "tools": {},
            "seconds": 60.0,
        },
    ],
}
EXPORTED = {**OLD, "history": OLD["history"][:1]}
DEFAULTS = [{"name": "optimize", "options": {"recipe": "fp32", "target": "cpu"}}]


def refusal(directory: Path, content: object) -> str:
    (directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError) as caught:
        Manifest.read(directory)
    message = str(caught.value)
    assert message.isprintable()
    return message


def command(directory: Path, content: object) -> list[str]:
    """Return the words of the command that a refusal of format 1 ends with."""
    message = refusal(directory, content)
    match = re.fullmatch(
        r"(.*) has format 1, but .* reads format 2: build it again with `(.*)`", message
    )
    assert match is not None, message
    return shlex.split(match[2])


def rebuild(
    directory: Path, *options: str, stage: str = "build", checkpoint: str | None = None
) -> list[str]:
    name = OLD["source"]["checkpoint"] if checkpoint is None else checkpoint
    return ["latentforge", stage, name, str(directory), *options, "--overwrite"]


CASES = [
    (OLD, ("--target", "openvino", "--recipe", "int8")),
    ({**OLD, "fast": {"steps": 8}}, ("--target", "openvino", "--recipe", "int8", "--fast")),
    ({**OLD, "history": DEFAULTS}, ()),
    ({**OLD, "history": []}, ()),
]


@pytest.mark.parametrize(("content", "options"), CASES)
def test_format_1_names_the_build_command(
    tmp_path: Path, content: Tree, options: tuple[str, ...]
) -> None:
    assert command(tmp_path, content) == rebuild(tmp_path, *options)


def test_format_1_of_an_export_names_the_export_command(tmp_path: Path) -> None:
    assert command(tmp_path, EXPORTED) == rebuild(tmp_path, stage="export")


def test_words_of_the_command_are_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "my engines; true"
    directory.mkdir()
    name = "a b'c$(true)"
    content = {**EXPORTED, "source": {"checkpoint": name}}
    assert command(directory, content) == rebuild(directory, stage="export", checkpoint=name)


@pytest.mark.parametrize("name", ["\x1b[2Jx", "line\nbreak", "\u202ex"])
def test_unprintable_characters_are_escaped(tmp_path: Path, name: str) -> None:
    content = {**OLD, "source": {"checkpoint": name}}
    assert name not in refusal(tmp_path, content)
    assert command(tmp_path, content)[2] == name.encode("unicode_escape").decode()


NOT_A_CHECKPOINT = [None, 3, "", "--token", "x" * 201, ["a"], {"a": 1}, True]


@pytest.mark.parametrize("name", NOT_A_CHECKPOINT, ids=repr)
def test_a_damaged_checkpoint_name_is_left_open(tmp_path: Path, name: object) -> None:
    content = {**OLD, "source": {"checkpoint": name}}
    assert command(tmp_path, content)[2] == "CHECKPOINT"


DAMAGED: list[tuple[str, object]] = [
    ("source", None),
    ("source", []),
    ("source", "x"),
    ("history", None),
    ("history", 7),
    ("history", {"name": "optimize"}),
    ("history", [None, 3, "export", [], {}, {"name": ["optimize"]}, {"name": {}}]),
    ("history", [{"name": "optimize"}]),
    ("history", [{"name": "optimize", "options": 3}]),
    ("history", [{"name": "optimize", "options": {"recipe": ["int8"], "target": None}}]),
    ("history", [{"name": "optimize", "options": {"recipe": "int8; true", "target": "--gate"}}]),
    ("history", [{"name": "optimize", "options": {"recipe": "my/own.toml", "target": "x" * 99}}]),
    ("fast", "yes"),
]


@pytest.mark.parametrize(("key", "value"), DAMAGED)
def test_damaged_keys_are_left_out_of_the_command(tmp_path: Path, key: str, value: object) -> None:
    words = command(tmp_path, {**OLD, "history": [], key: value})
    checkpoint = "CHECKPOINT" if key == "source" else None
    assert words == rebuild(tmp_path, checkpoint=checkpoint)


def test_format_1_alone_is_enough(tmp_path: Path) -> None:
    assert command(tmp_path, {"format": 1}) == rebuild(tmp_path, checkpoint="CHECKPOINT")


@pytest.mark.parametrize("number", [FORMAT + 1, 999, 2**63 - 1])
def test_a_newer_format_asks_for_the_newer_release(tmp_path: Path, number: int) -> None:
    message = refusal(tmp_path, {"format": number, "unheard_of": True})
    shown = number if number < 10**9 else "unknown"
    assert f"has format {shown}, but latentforge" in message
    assert "install the newer latentforge" in message


@pytest.mark.parametrize("number", [0, -1, -(2**62)])
def test_a_format_that_never_existed_is_refused(tmp_path: Path, number: int) -> None:
    assert "there is no such format; export again" in refusal(tmp_path, {"format": number})
