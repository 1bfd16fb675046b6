"""The file of a measurement: what is written is read again, and nothing else is."""

import json
from pathlib import Path

import msgspec
import pytest
from measured import BENCH, EVAL

from latentforge.measure.results import Metric, Results
from latentforge.runtime.errors import ResultsError, TargetError


@pytest.mark.parametrize("results", [BENCH, EVAL], ids=["bench", "eval"])
def test_what_is_written_is_read_again(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    again = Results.read(tmp_path / "results.json")
    assert again == results
    assert again.encode() == results.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_file_is_plain_json_with_its_format(tmp_path: Path) -> None:
    data = json.loads(BENCH.encode())
    assert data["format"] == 1
    assert data["entries"][1]["ratio"]["total"]["value"] == BENCH.entries[1].ratio["total"].value


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ResultsError) as caught:
        Results.read(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**json.loads(BENCH.encode()), "format": 2}))
    refused(path, "format 2", "measure again")


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[1, 2]", "3", '"format"', "{}", '{"format": 1}', "\x00\x01"]
)
def test_what_is_no_results_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text(text)
    refused(tmp_path / "no.json", "no.json", "bench or eval wrote")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_bytes(b'{"format": 1, "machine": "\xff\xfe"}')
    refused(tmp_path / "no.json", "no.json")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    data = BENCH.encode()
    (tmp_path / "cut.json").write_bytes(data[: int(len(data) * share)])
    refused(tmp_path / "cut.json", "cut.json", "not JSON")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("title", 3, "title"),
        ("entries", [{"name": "x"}], "role"),
        ("entries", [{"name": "x", "role": "boss"}], "boss"),
        ("machine", "a string", "machine"),
        ("speed", 1, "speed"),
    ],
)
def test_a_damaged_value_is_named(key: str, value: object, word: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**json.loads(BENCH.encode()), key: value}))
    refused(tmp_path / "bad.json", word, "measure again")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.json", "cannot read", "No such file")
    refused(tmp_path, "cannot read", "directory")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(300 << 20)  # of zeros, which take no room on the disk
    refused(tmp_path / "huge.json", "larger than results are")


def test_no_number_is_never_read_as_one(tmp_path: Path) -> None:
    """JSON has no NaN: where a number has to be, the file is refused, and not taken for zero."""
    metric = Metric(name="fid", subject="x", value=float("nan"), images=2, better="lower")
    msgspec.structs.replace(EVAL, metrics=(metric,)).write(tmp_path / "nan.json")
    refused(tmp_path / "nan.json", "metrics[0].value", "measure again")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        BENCH.write(tmp_path / "none" / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_the_reference_is_found_by_its_role() -> None:
    assert BENCH.reference is BENCH.entries[0]
    assert EVAL.reference is None
