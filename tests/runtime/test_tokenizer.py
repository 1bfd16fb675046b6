"""Token ids equal those of transformers' CLIPTokenizer for any text."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentforge.export.demo import CHECKPOINT, COLORS, NAMES
from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.manifest import Manifest, TokenizerEntry

Written = tuple[Path, TokenizerEntry]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Write the demo's tokenizer as export does."""
    pytest.importorskip("transformers", exc_type=ImportError)
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.tokenizers import write_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    entry = write_tokenizer(open_checkpoint("demo"), "tokenizer", directory)
    return directory / entry.file, entry


@pytest.fixture(scope="module")
def tokenizer(written: Written) -> Tokenizer:
    return Tokenizer(*written)


# Scripts, marks, emoji, controls, spaces, and what normalizers like to change.
RANGES = [
    (0x20, 0x7E),
    (0x00, 0x1F),
    (0x7F, 0xA0),
    (0xA1, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x5FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x1E00, 0x1FFF),
    (0x2000, 0x206F),
    (0x2070, 0x24FF),
    (0x3000, 0x30FF),
    (0x4E00, 0x4FFF),
    (0xAC00, 0xACFF),
    (0xE000, 0xE0FF),
    (0xF900, 0xFAFF),
    (0xFE00, 0xFFFD),
    (0x1D400, 0x1D4FF),
    (0x1F300, 0x1FAFF),
    (0xE0020, 0xE007F),
]
PIECES = [
    *NAMES[:40],
    *COLORS,
    *("<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|endoftext", "</w>", "<s>", "[MASK]"),
    *("it's", "they'LL", "I'd've", "'s", "don\u2019t", "1234", "3.14", "1e-5", "\u00bd", "\u0663"),
    *("<b>red</b>", "&amp;", "&lt;|endoftext|&gt;", "<!-- x -->", "http://a.b/c?d=e#f", "a_b"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f"),
    *("e\u0301", "\u00e9", "\ufb01", "\u0130", "\u1e9e", "\u212b", "A\u030a\u0323", "\u03c2\u03a3"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\ufeff", "\x00", "\x1b[0m"),
    *("!!!", "...", "-", "(((red)))", "[a:b:0.5]", "{", "\\", '"', "#", "%s", "\u2026", "\uff01"),
]


def text(rng: random.Random) -> str:
    """Return a random string of any kind; most are short, as prompts are."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(["", " ", "\n\t ", "\u3000", "a" * 500, "word " * 200, "\U0001f98a" * 99])
    if kind < 0.5:
        glue = rng.choice(["", " ", " ", ", "])
        return glue.join(rng.choice(PIECES) for _ in range(rng.randrange(1, 12)))
    low, high = rng.choice(RANGES)
    characters = (rng.randint(low, high) for _ in range(rng.randrange(1, 24)))
    mixed = "".join(map(chr, characters))
    return mixed if kind < 0.8 else f"{rng.choice(PIECES)}{mixed} {rng.choice(PIECES)}"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ten_thousand_strings(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPTokenizer

    caplog.set_level(logging.ERROR, "latentforge")
    rng = random.Random(0)
    prompts = [text(rng) for _ in range(10_000)]
    theirs = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    expected = theirs(prompts, padding="max_length", truncation=True)["input_ids"]
    ours = tokenizer(prompts)
    assert ours.dtype == np.int64 and ours.shape == (10_000, tokenizer.max_length)
    wrong = [p for p, a, b in zip(prompts, ours.tolist(), expected, strict=True) if a != b]
    assert wrong == []
    assert len({tuple(ids) for ids in expected}) > 9_000  # they really are varied


def test_a_batch_equals_single_prompts(tokenizer: Tokenizer) -> None:
    prompts = ["a red apple", "", "fox " * 4]
    alone = np.concatenate([tokenizer([prompt]) for prompt in prompts])
    np.testing.assert_array_equal(tokenizer(prompts), alone)


# What is cut off


def cut(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, *prompts: str) -> list[str]:
    caplog.clear()
    tokenizer(prompts)
    return [record.getMessage() for record in caplog.records]


def test_warns_of_truncation(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    assert cut(tokenizer, caplog, "a red apple", "") == []
    messages = cut(tokenizer, caplog, "a " * 22 + "Blaue Äpfel\n<|x|>", "fox")
    assert messages == ["prompt truncated to 24 tokens; ignored: 'Blaue Äpfel\\n<|x|>'"]
    assert tokenizer.ignored("a " * 22 + "Blaue Äpfel\n<|x|>") == "Blaue Äpfel\n<|x|>"
    assert tokenizer.ignored("a " * 22) == tokenizer.ignored("") == ""


def test_the_warning_is_short(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = cut(tokenizer, caplog, "a " * 22 + "zebra " * 1000)
    assert message.endswith("...'") and len(message) < 110 and "endoftext" not in message


# Damaged files


def refused(written: Written, tmp_path: Path, content: bytes, **entry: Any) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        Tokenizer(path, msgspec.structs.replace(written[1], **entry))
    message = str(caught.value)
    assert str(path) in message and "export again" in message and "\n" not in message
    return message


NO_TOKENIZERS = [b"", b"{", b"{}", b"null", b"[" * 100_000, b"\xff" * 99, b'{"version": "9.0"}']


@pytest.mark.parametrize("content", NO_TOKENIZERS, ids=range(len(NO_TOKENIZERS)))
def test_rejects_an_invalid_file(written: Written, tmp_path: Path, content: bytes) -> None:
    refused(written, tmp_path, content)


def test_rejects_a_truncated_file(written: Written, tmp_path: Path) -> None:
    content = written[0].read_bytes()
    for size in (100, 1000, len(content) // 2, len(content) - 10):
        refused(written, tmp_path, content[:size])


def test_refuses_a_missing_file(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.json is not a valid tokenizer file"):
        Tokenizer(tmp_path / "gone.json", written[1])


def no_padding(content: dict[str, Any]) -> None:
    content["padding"] = None


def other_padding(content: dict[str, Any]) -> None:
    content["padding"]["strategy"] = {"Fixed": 77}


def endless_padding(content: dict[str, Any]) -> None:
    content["padding"]["strategy"] = {"Fixed": 2**62}


def padding_to_multiples(content: dict[str, Any]) -> None:
    content["padding"]["pad_to_multiple_of"] = 64


def no_vocabulary(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {}


@pytest.mark.timeout(20)  # padding without end takes all memory, after minutes
@pytest.mark.parametrize(
    "change",
    [no_padding, other_padding, endless_padding, padding_to_multiples, no_vocabulary],
)
def test_refuses_a_tokenizer_that_does_not_fit(
    written: Written, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads(written[0].read_text())
    change(content)
    refused(written, tmp_path, json.dumps(content).encode())


def test_rejects_another_length_than_in_the_manifest(written: Written, tmp_path: Path) -> None:
    message = refused(written, tmp_path, written[0].read_bytes(), max_length=77)
    assert "77" in message


def test_the_entry_is_that_of_the_file(written: Written, tiny_engines: Path) -> None:
    entry = Manifest.read(tiny_engines).tokenizers["tokenizer"]
    assert entry == written[1] and entry.max_length == 24


# Textual inversions of several vectors

TOYS = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<dog>", "<fur>", "<fur>_1", "<fur>_3", "Zed_1"]
TOY_PROMPTS = [
    "a <cat-toy> fox",
    "<cat-toy><cat-toy> and <dog>, <fur>",
    "a <cat-toy>_1 alone, <fur>_3",
    "<CAT-TOY> Zed cat-toy <fur",
    "no toy",
    "",
    "<fur> " * 9,
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_placeholders_become_all_their_vectors(written: Written, tmp_path: Path) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert theirs.add_tokens(TOYS) == len(TOYS)
    content = json.loads(theirs.backend_tokenizer.to_str())
    content |= {key: json.loads(written[0].read_text())[key] for key in ("padding", "truncation")}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    prompts = TextualInversionLoaderMixin().maybe_convert_prompt(TOY_PROMPTS, theirs)
    assert prompts[0] == "a <cat-toy> <cat-toy>_1 <cat-toy>_2 fox"
    expected = theirs(prompts, padding="max_length", max_length=24, truncation=True)["input_ids"]
    assert Tokenizer(path, written[1])(TOY_PROMPTS).tolist() == expected


def test_placeholders_have_an_end(written: Written, tmp_path: Path) -> None:
    """Added tokens are free, but the prompt with all of them is not longer than it may be."""
    content = json.loads(written[0].read_text())
    template, count = content["added_tokens"][0], len(content["model"]["vocab"])
    names = ["<x>", *(f"<x>_{index}" for index in range(1, 1000))]
    content["added_tokens"] += [
        {**template, "content": name, "id": count + index, "special": False}
        for index, name in enumerate(names)
    ]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    many = Tokenizer(path, written[1])
    assert many(["<x>"])[0, 1:23].tolist() == list(range(count, count + 22))
    with pytest.raises(SettingsError, match="characters with all vectors of '<x>'"):
        many(["<x>" * 100])
