"""Check of a tokenizer file before the tokenizers library reads it.

A prompt must not find what loading can: a model that draws tokens at random or cannot encode every
text, and steps whose output grows, or whose patterns backtrack, without bound. Some of these end
the process, because the library is compiled code that aborts.
"""

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, TypeAlias

from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["check_token_ids", "check_tokenizer_file"]

_Section: TypeAlias = Mapping[str, Any]

_MAX_GROWTH = 256
"""Most characters that the steps before the model may make of one; CLIP's may make 96."""

_MAX_PATTERN = 1000
_MAX_WORD = 1000  # characters: WordPiece takes time cubic in them
_MAX_TEMPLATE = 64
_MAX_PADDING = 8192  # tokens
_MAX_ID = 1 << 20

# Characters that a step makes of one at most (Unicode 16: UAX #15, SpecialCasing.txt).
_GROWTH: Mapping[str, Mapping[str, int]] = {
    "normalizer": {
        "BertNormalizer": 12,
        "ByteLevel": 4,
        "Lowercase": 3,
        "NFC": 4,
        "NFD": 4,
        "NFKC": 18,
        "NFKD": 18,
        "Nmt": 1,
        "Strip": 1,
        "StripAccents": 1,
    },
    "pre_tokenizer": {
        "BertPreTokenizer": 1,
        "ByteLevel": 4,
        "CharDelimiterSplit": 1,
        "Digits": 1,
        "FixedLength": 1,
        "Metaspace": 2,
        "Punctuation": 1,
        "Split": 1,
        "UnicodeScripts": 1,
        "Whitespace": 1,
        "WhitespaceSplit": 1,
    },
}


def check_tokenizer_file(content: Any) -> None:
    """Refuse a tokenizer that is random, incomplete, or slow without bound.

    Args:
        content: the parsed tokenizer.json.

    Raises:
        ValueError: it is one of these; the message says what.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no model")
    growth = prod(
        _growth(kind, step) for kind in _GROWTH for step in _steps(content.get(kind), f"{kind}s")
    )
    if growth > _MAX_GROWTH:
        raise ValueError(
            f"its normalizer and pre_tokenizer make up to {min(growth, 10**9)} characters of one, "
            f"and {_MAX_GROWTH} are allowed"
        )
    for step in _steps(content.get("post_processor"), "processors"):
        _check_template(step)
    _check_padding(content.get("padding"))
    for pattern in _patterns(content):
        _check_pattern(pattern)
    _check_model(content["model"], content.get("pre_tokenizer"))


def _steps(section: Any, key: str) -> Iterator[_Section]:
    """Yield the steps of a section, those of its sequences too."""
    if section is None:
        return
    if not isinstance(section, dict):
        raise ValueError(f"a step of its {key} is not an object")
    if section.get("type") != "Sequence":
        yield section
        return
    inner = section.get(key.replace("_", ""), ())
    for step in inner if isinstance(inner, list) else [inner]:
        yield from _steps(step, key)


def _growth(kind: str, step: _Section) -> int:
    name = str(step.get("type"))
    if kind == "normalizer" and name == "Replace":
        # A pattern may match between any two characters.
        return max(1, len(str(step.get("content")))) + 1
    if kind == "normalizer" and name == "Prepend":
        return len(str(step.get("prepend"))) + 1
    if name not in _GROWTH[kind]:
        raise ValueError(f"a {kind} of type {name!r} is not supported")
    return _GROWTH[kind][name]


def _check_template(step: _Section) -> None:
    """Refuse a template that repeats the prompt."""
    if step.get("type") != "TemplateProcessing":
        return
    pieces = step.get("single")
    if not isinstance(pieces, list) or len(pieces) > _MAX_TEMPLATE:
        raise ValueError(f"its template is not a list of at most {_MAX_TEMPLATE} pieces")
    prompts = [piece["Sequence"] for piece in pieces if "Sequence" in piece]
    if len(prompts) != 1 or prompts[0].get("id") != "A":
        raise ValueError("its template does not hold the prompt exactly once")


def _check_padding(padding: Any) -> None:
    """Refuse a padding that fills the memory."""
    if not isinstance(padding, dict):
        return
    strategy = padding.get("strategy")
    lengths = strategy.values() if isinstance(strategy, dict) else ()
    for length in (*lengths, padding.get("pad_to_multiple_of") or 0):
        if type(length) is not int or not 0 <= length <= _MAX_PADDING:
            raise ValueError(f"its padding is to {reprlib.repr(length)} tokens")


def _patterns(value: Any) -> Iterator[str]:
    """Yield the regular expressions of all steps; the model's part has none."""
    if isinstance(value, list):
        for item in value:
            yield from _patterns(item)
    elif isinstance(value, dict):
        if isinstance(pattern := value.get("Regex"), str):
            yield pattern
        for key, item in value.items():
            if key not in ("model", "added_tokens"):
                yield from _patterns(item)


def _check_pattern(pattern: str) -> None:
    """Refuse a regular expression that may backtrack for long, or that takes long to compile.

    Alternatives of at most one repetition and no group match in quadratic time.
    """
    plain = _without_classes(pattern)
    for part in plain.split("|"):
        repeats, optional = len(re.findall(r"[*+{]", part)), part.count("?")
        if len(pattern) > _MAX_PATTERN or "(" in part or repeats > 1 or optional > 2:
            raise ValueError(
                f"its pattern {pattern[:60]!r} may take long: it has groups, or several "
                "repetitions in one alternative"
            )


def _without_classes(pattern: str) -> str:
    """Return a pattern with an ``x`` for each escape, Unicode property and character class."""
    escaped = re.sub(r"\\[pP]\{\^?\w+\}|\\.", "x", pattern, flags=re.DOTALL)
    depth, kept = 0, []
    for character in escaped:
        if character == "[":
            kept += [] if depth else ["x"]
            depth += 1
        elif character == "]" and depth:
            depth -= 1
        elif not depth:
            kept.append(character)
    return "".join(kept)


def _check_model(model: _Section, pre_tokenizer: Any) -> None:
    for key in ("dropout", "alpha", "nbest_size"):
        if model.get(key):
            raise ValueError(f"its {key} of {model[key]!r} draws tokens at random")
    kind = str(model.get("type"))
    if kind not in _HAS_UNKNOWN:
        raise ValueError(f"a model of type {kind!r} is not supported")
    length = model.get("max_input_chars_per_word", 0)
    if not isinstance(length, int) or length > _MAX_WORD:
        raise ValueError(f"its max_input_chars_per_word must be at most {_MAX_WORD}")
    if isinstance(vocabulary := model.get("vocab"), dict):
        check_token_ids(vocabulary)
    if not _HAS_UNKNOWN[kind](model, pre_tokenizer):
        token = model.get("unk_id") if kind == "Unigram" else model.get("unk_token")
        raise ValueError(f"its unknown token {token!r} is not in the vocabulary")


def check_token_ids(vocabulary: Mapping[str, Any]) -> None:
    """Refuse token ids that are no indices, or so large that the library's tables fill the memory.

    Raises:
        ValueError: there is one; the message names its token.
    """
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < _MAX_ID:
            raise ValueError(
                f"the id of token {token[:60]!r} must be an integer from 0 to {_MAX_ID - 1}, not "
                f"{reprlib.repr(number)}"
            )


def _names_unknown(model: _Section, _: Any) -> bool:
    return isinstance(model.get("unk_token"), str) and model["unk_token"] in model["vocab"]


def _counts_unknown(model: _Section, _: Any) -> bool:
    index = model.get("unk_id")
    return isinstance(index, int) and 0 <= index < len(model["vocab"])


def _names_unknown_or_has_bytes(model: _Section, pre_tokenizer: Any) -> bool:
    """Return True if byte-pair encoding has a token for every text."""
    if model.get("unk_token") is not None:
        return _names_unknown(model, pre_tokenizer)
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    suffixes = {"", model.get("end_of_word_suffix") or ""}
    letters = {letter + suffix for letter in ByteLevel.alphabet() for suffix in suffixes}
    steps = _steps(pre_tokenizer, "pre_tokenizers")
    return any(step.get("type") == "ByteLevel" for step in steps) and letters <= set(model["vocab"])


_HAS_UNKNOWN: Mapping[str, Callable[[_Section, Any], bool]] = {
    "BPE": _names_unknown_or_has_bytes,
    "Unigram": _counts_unknown,
    "WordLevel": _names_unknown,
    "WordPiece": _names_unknown,
}
