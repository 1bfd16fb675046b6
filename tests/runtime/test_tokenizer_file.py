"""A tokenizer file that would be random, incomplete or endless is refused before it is loaded."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import BPE, Model, Unigram, WordLevel, WordPiece
from tokenizers.normalizers import NFKD, Lowercase, Normalizer, Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import ByteLevel, Split, Whitespace
from tokenizers.processors import TemplateProcessing

from latentforge.runtime.conditioning.tokenizer import Tokenizer
from latentforge.runtime.conditioning.tokenizer_file import check_tokenizer_file
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import TokenizerEntry

LENGTH = 8
WORDS = {"?": 0, "a": 1, "owl": 2, "o": 3, "w": 4, "l": 5}
BYTES = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}

Content = dict[str, Any]


def content(model: Model | None = None, normalizer: Normalizer | None = None) -> Content:
    """Return a file of a word-level tokenizer, or of another model."""
    tokenizer = tokenizers.Tokenizer(model or WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.enable_padding(length=LENGTH)
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


def load(content: Content, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    entry = TokenizerEntry(
        file="tokenizer.json", sha256="0" * 64, bytes=path.stat().st_size, max_length=LENGTH
    )
    return Tokenizer(path, entry)


def refused(content: Content, folder: Path, reason: str) -> None:
    start = time.process_time()  # not what others of this machine take
    with pytest.raises(ManifestError, match=reason) as caught:
        load(content, folder)
    assert time.process_time() - start < 1
    assert "export again" in str(caught.value) and "\n" not in str(caught.value)


MODELS = {
    "word-level": WordLevel(WORDS, unk_token="?"),
    "wordpiece": WordPiece(WORDS, unk_token="?"),
    "bpe": BPE(WORDS, [], unk_token="?"),
    "unigram": Unigram([(word, -1.0) for word in WORDS], 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_encodes_every_text(name: str, tmp_path: Path) -> None:
    tokenizer = load(content(MODELS[name]), tmp_path)
    assert tokenizer(["an owl \U0001f98a\u0301", "", "\u4e00" * 999]).shape == (3, LENGTH)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("token", [None, "[UNK]", 99, -1])
def test_an_unknown_token_has_to_exist(name: str, token: object, tmp_path: Path) -> None:
    file = content(MODELS[name])
    file["model"]["unk_id" if name == "unigram" else "unk_token"] = token
    refused(file, tmp_path, "unknown token .* not in the vocabulary")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("key", "value"), [("dropout", 0.5), ("dropout", 1e-9), ("alpha", 0.1)])
def test_random_models(name: str, key: str, value: float, tmp_path: Path) -> None:
    file = content(MODELS[name])
    file["model"][key] = value
    refused(file, tmp_path, f"its {key} of {value} draws tokens at random")


def test_no_dropout_is_no_dropout(tmp_path: Path) -> None:
    for value in (None, 0.0):
        file = content(MODELS["bpe"])
        file["model"]["dropout"] = value
        assert load(file, tmp_path)(["owl"]).shape == (1, LENGTH)


def test_bytes_need_no_unknown_token(tmp_path: Path) -> None:
    file = content(BPE(BYTES, []))
    refused(file, tmp_path, "unknown token None")
    file["pre_tokenizer"] = json.loads(ByteLevel().__getstate__())
    load(file, tmp_path)
    del file["model"]["vocab"]["!"]
    refused(file, tmp_path, "unknown token None")


def bomb(count: int, length: int) -> Normalizer:
    return Sequence([Replace("o", "o" * length)] * count)


BOMBS = {
    "three": bomb(3, 1000),
    "one": bomb(1, 1000),
    "doubling": bomb(40, 2),
    "nested": Sequence([bomb(2, 10), Sequence([bomb(2, 10)])]),
    "prepended": Sequence([Prepend("ooooooooo")] * 4),
    "between": Sequence([Replace("", "oooo")] * 6),
    "matched": Sequence([Replace(tokenizers.Regex("."), "oooo")] * 6),
    "compatible": Sequence([NFKD()] * 9),
}


@pytest.mark.parametrize("name", BOMBS)
def test_normalizers_that_multiply(name: str, tmp_path: Path) -> None:
    refused(content(normalizer=BOMBS[name]), tmp_path, "make up to [0-9]+ characters of one")


def test_pre_tokenizers_that_multiply(tmp_path: Path) -> None:
    file = content()
    level = json.loads(ByteLevel().__getstate__())
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [level] * 30}
    refused(file, tmp_path, "make up to [0-9]+ characters of one")


def test_templates_that_repeat_the_prompt(tmp_path: Path) -> None:
    file = content()
    for single in ("$A $A", "?"):
        template = TemplateProcessing(single=single, special_tokens=[("?", 0)])
        file["post_processor"] = json.loads(template.__getstate__())
        refused(file, tmp_path, "template does not hold the prompt exactly once")
    file["post_processor"]["single"] = [{"Sequence": {"id": "B", "type_id": 0}}]
    refused(file, tmp_path, "template does not hold the prompt exactly once")
    many = TemplateProcessing(single="? " * 999 + "$A", special_tokens=[("?", 0)])
    file["post_processor"] = json.loads(many.__getstate__())
    refused(file, tmp_path, "at most 64 pieces")


SLOW = ["(a+)+b", "(a|a)*b", "a*a*b", "((a{9}){9}){9}", r"(\w)\1", "a{0,99}a{0,99}b", "a?a?a?b"]


@pytest.mark.parametrize("pattern", [*SLOW, "x" * 1001])
def test_patterns_that_backtrack(pattern: str, tmp_path: Path) -> None:
    regex = tokenizers.Regex(pattern)
    refused(content(normalizer=Replace(regex, "")), tmp_path, "its pattern .* may take long")
    file = content()
    file["pre_tokenizer"] = json.loads(Split(regex, "removed").__getstate__())
    refused(file, tmp_path, "its pattern .* may take long")


@pytest.mark.parametrize(
    "pattern", [r"\s+", r"\(a\)+|[(*+]+|\p{L}+", "[[:alpha:]&&[^(]]+", " {2,}"]
)
def test_patterns_of_one_repetition(pattern: str, tmp_path: Path) -> None:
    regex = tokenizers.Regex(pattern)
    load(content(normalizer=Replace(regex, " ")), tmp_path)


def charsmap(file: Content) -> None:
    """A table that is longer than the file: the library aborts."""
    file["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}


def unknown_step(file: Content) -> None:
    file["pre_tokenizer"] = {"type": "Unheard"}


def no_step(file: Content) -> None:
    file["normalizer"] = ["NFC"]


def long_words(file: Content) -> None:
    file["model"] |= {"type": "WordPiece", "max_input_chars_per_word": 10**9}


def no_type(file: Content) -> None:
    del file["model"]["type"]


def twice(file: Content) -> None:
    file["normalizer"] = {"type": "Sequence", "normalizers": [file["normalizer"]] * 2}
    charsmap(file)


@pytest.mark.parametrize("change", [charsmap, unknown_step, no_step, long_words, no_type, twice])
def test_files_of_other_kinds(change: Callable[[Content], None], tmp_path: Path) -> None:
    file = content(normalizer=Lowercase())
    change(file)
    refused(file, tmp_path, "not supported|is not an object|must be at most")


def test_the_file_is_loaded_as_it_was_checked(tmp_path: Path) -> None:
    """The last of two equal keys counts in the check, so it has to in the library."""
    good, bad = content(), content(normalizer=bomb(3, 1000))
    text = json.dumps(good)[:-1] + f', "normalizer": null, "model": {json.dumps(good["model"])}}}'
    text = text.replace('"normalizer": null', f'"normalizer": {json.dumps(bad["normalizer"])}', 1)
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    entry = TokenizerEntry(file="t", sha256="0" * 64, bytes=1, max_length=LENGTH)
    assert Tokenizer(path, entry)(["owl"])[0, 0] == WORDS["owl"]


def test_an_error_at_a_prompt_blames_the_file(tmp_path: Path) -> None:
    tokenizer = load(content(), tmp_path)

    class Failing:
        def encode_batch(self, prompts: list[str]) -> None:
            raise ValueError(f"cannot encode {prompts}")

    tokenizer._tokenizer = Failing()  # type: ignore[assignment]
    with pytest.raises(ManifestError, match="tokenizer.json is not a valid .* cannot encode"):
        tokenizer(["owl"])


@pytest.mark.parametrize("value", [None, 3, [], "x", {}, {"model": None}, {"model": {}}])
def test_what_is_no_tokenizer(value: object) -> None:
    with pytest.raises(ValueError, match="has no model|of type 'None'"):
        check_tokenizer_file(copy.deepcopy(value))


PADDINGS = (
    *({"strategy": {"Fixed": length}} for length in (2**62, 10**9, -1, "8", None, 1.5, True)),
    *({"pad_to_multiple_of": length} for length in (2**62, 10**9, -1, "8", 1.5, True, [])),
)


@pytest.mark.parametrize("change", PADDINGS, ids=str)
def test_a_padding_that_fills_the_memory(change: Content, tmp_path: Path) -> None:
    file = content()
    file["padding"] |= change
    refused(file, tmp_path, "its padding is to|not a valid tokenizer file")


def test_a_file_of_hundreds_of_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    entry = TokenizerEntry(file=path.name, sha256="0" * 64, bytes=1 << 30, max_length=LENGTH)
    with pytest.raises(ManifestError, match="it has 1024 MiB, and 24 are allowed"):
        Tokenizer(path, entry)
