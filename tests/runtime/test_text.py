"""Texts for messages."""

import pytest

from latentforge.runtime.text import duration_text, near_miss, one_line, printable, size_text


def test_one_line_joins_lines_and_cuts() -> None:
    assert one_line(ValueError("one\n  two\tthree")) == "one two three"
    assert one_line(AssertionError()) == "AssertionError"
    cut = one_line(ValueError("x" * 10_000))
    assert len(cut) == 300 and cut.endswith("x...")
    assert len(one_line(ValueError("x" * 10_000), limit=None)) == 10_000
    assert one_line(ValueError("abcdef"), limit=5) == "ab..."
    assert one_line(ValueError("abcde"), limit=5) == "abcde"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, 蝶", "plain text, 蝶"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable_escapes_what_a_terminal_would_interpret(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(text).isprintable()


def test_near_miss_suggests_the_closest_choice_and_lists_all() -> None:
    assert near_miss("stpes", ["steps", "seed"]) == "did you mean 'steps'? choose from steps, seed"
    assert near_miss("colour", ["steps", "seed"]) == "choose from steps, seed"


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 1.4e6, 999.4e6, 1e9, 2.56e9)] == [
        "0 MB",
        "1 MB",
        "999 MB",
        "1.0 GB",
        "2.6 GB",
    ]


def test_durations() -> None:
    texts = [duration_text(seconds) for seconds in (0.2, 89, 90, 3569, 3600, 7530)]
    assert texts == ["0s", "89s", "2m", "59m", "1h00m", "2h06m"]
