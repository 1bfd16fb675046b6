"""Result files: a round trip is exact, and anything else is refused."""

import json
from pathlib import Path

import msgspec
import pytest
from measured import BENCH, EVAL

from latentforge.measure.results import FORMAT, ConfidenceInterval, Metric, Results
from latentforge.runtime.errors import ResultsError, TargetError


@pytest.mark.parametrize("results", [BENCH, EVAL], ids=["bench", "eval"])
def test_round_trip(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    again = Results.read(tmp_path / "results.json")
    assert again == results
    assert again.encode() == results.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_file_is_plain_json_with_its_format(tmp_path: Path) -> None:
    data = json.loads(BENCH.encode())
    assert data["format"] == FORMAT == 2
    ratio = BENCH.entries[1].ratio["total"]
    assert data["entries"][1]["ratio"]["total"] == {
        "value": ratio.value, "low": ratio.low, "high": ratio.high, "level": 0.9375,
    }  # fmt: skip


METRIC = {"name": "fid", "subject": "x", "value": 1.0, "images": 2, "better": "lower"}


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ResultsError) as caught:
        Results.read(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("number", [1, 3, "two", None])
def test_another_format_is_refused_with_the_remedy(number: object, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**json.loads(BENCH.encode()), "format": number}))
    words = ["old.json", f"format {number!r}", "reads format 2", "measure again with latentforge"]
    refused(path, *words)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[1, 2]", "3", '"format"', "{}", '{"format": 2}', "\x00\x01"]
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text(text)
    refused(tmp_path / "no.json", "no.json", "name a --json file of bench or eval")


def test_invalid_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_bytes(b'{"format": 2, "machine": "\xff\xfe"}')
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
        (
            "entries",
            [{"name": "x", "role": "peer", "ratio": {"total": {"value": 1, "low": 1}}}],
            "level",
        ),
        ("metrics", [{**METRIC, "low": 0.5, "high": 1.5}], "level"),
        ("machine", "a string", "machine"),
        ("speed", 1, "speed"),
    ],
)
def test_a_damaged_value_is_named(key: str, value: object, word: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**json.loads(BENCH.encode()), key: value}))
    refused(tmp_path / "bad.json", word, "measure again")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.json", "cannot read", "No such file")
    refused(tmp_path, "cannot read", "not a regular file")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(300 << 20)  # sparse: takes no disk space
    refused(tmp_path / "huge.json", "larger than 268 MB")


def test_nan_is_not_read_as_a_number(tmp_path: Path) -> None:
    """JSON has no NaN: a file that lacks a required number is refused, not read as zero."""
    metric = Metric(name="fid", subject="x", value=float("nan"), images=2, better="lower")
    msgspec.structs.replace(EVAL, metrics=(metric,)).write(tmp_path / "nan.json")
    refused(tmp_path / "nan.json", "metrics[0].value", "measure again")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        BENCH.write(tmp_path / "none" / "results.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"low": 0.9, "high": 1.1},
        {"low": 0.9, "level": 0.95},
        {"level": 0.95},
        {"low": 0.9, "high": 1.1, "level": 0.0},
        {"low": 0.9, "high": 1.1, "level": 95.0},
    ],
)
def test_an_interval_needs_both_bounds_and_a_level(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="level"):
        ConfidenceInterval(value=1.0, **fields)


def test_the_reference_is_found_by_its_role() -> None:
    assert BENCH.reference is BENCH.entries[0]
    assert EVAL.reference is None
