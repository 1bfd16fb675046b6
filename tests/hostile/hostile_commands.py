"""Command lines with one to three hostile options or arguments, by number.

The options are those of the parsers themselves. No command line begins heavy work: those that would
take long name an input that ends the command after its last check.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from functools import cache

from hostile_requests import NAMES, Places

from latentforge.command_line import parser

__all__ = ["command_line"]

_VALUES: tuple[str, ...] = (
    *("", " ", "-1", "0", "1", "2", "3.5", "nan", "inf", "-inf", "1e308", "1e999", "9" * 30),
    *("9" * 5000, "1_0", "0x10", "٣", "a", "\ud800", "\udcff", "a\0b", "\x1b[31m", "\u202e", "é"),
    *("x" * 100_000, "a,b", ",", ",,,", "1,2,x", "64", "65", "64,72,65", "64:32:16", "64:64"),
    *("1:2:3:4", "16385", "1,2,3", "0:1", "0.2:0.8", "1:0", "nan:nan", ":", "psnr=nan", "=", "a="),
    *("=b", "psnr=20", "images=" + "9" * 30, "network=fifo", "colour=1", "threads=1", "threads=x"),
    *("device=GPU", "eager=zero", "eager=", "15m", "1e5s", "none", "0s", "0.s", "9" * 30 + "h"),
    *("-", "--", "--steps", "-o", "@file", "euler", "EULER", "lcm", "denoiser", "x=onnxruntime"),
    *("denoiser=null", "onnxruntime", "good.json", "image.png", "missing/image.png", "fifo.png"),
    *NAMES,
)
_NEVER_DRAWN = ("help", "debug", "version")  # --debug prints a traceback by design
_NO_FOLDERS = ("fifo", "zero", "loop", "empty/x", "x" * 300, "a\0b", "binary", "\ud800")


def command_line(index: int, places: Places) -> list[str]:
    """Return the arguments of a case."""
    rng = random.Random(index)
    commands = _commands()
    bases = _bases(places)
    name = rng.choice(list(bases))
    if name == "demo":  # would run in any folder that it can make
        return ["demo", rng.choice(_NO_FOLDERS)]
    positional, fixed = rng.choice(bases[name])
    words = list(positional)
    if rng.random() < 0.2:
        words[rng.randrange(len(words))] = rng.choice(_VALUES)
    drawn = [action for action in commands[name]._actions if _is_drawn(action)]
    count = rng.choice((1, 1, 2, 3)) if drawn else 0
    chosen = [text for action in rng.choices(drawn, k=count) for text in _option(rng, action)]
    return [name, *words, *fixed, *chosen]


@cache
def _commands() -> Mapping[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    whole = parser()
    return next(a.choices for a in whole._actions if isinstance(a, argparse._SubParsersAction))


def _bases(places: Places) -> Mapping[str, Sequence[tuple[Sequence[str], Sequence[str]]]]:
    """Return the arguments of each command, and options that come first, in one or more ways."""
    engines, checkpoint, broken = map(str, (places.engines, places.checkpoint, places.broken))
    backend = "--backend", "onnxruntime"
    return {
        "build": [((broken, "target"), ()), ((checkpoint, "target"), ("--dry-run",))],
        "export": [((broken, "target"), ())],
        "optimize": [((engines, "target"), ())],
        "compile": [((engines, "target"), (*backend, "--dry-run"))],
        "run": [((engines, "a red apple"), ("--steps", "1", "-o", "image.png"))],
        "bench": [((engines, "missing"), ())],
        "eval": [((engines, "missing"), ())],
        "report": [(("good.json",), ("-o", "page.html"))],
        "compare": [(("good.json", "good.json"), ())],
        "inspect": [((engines,), ())],
        "verify": [((engines,), ())],
        "demo": [],
    }


def _is_drawn(action: argparse.Action) -> bool:
    return bool(action.option_strings) and action.dest not in _NEVER_DRAWN


def _option(rng: random.Random, action: argparse.Action) -> list[str]:
    """Return an option with a value, in one of the ways in which it can be written."""
    name = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [name] if rng.random() < 0.8 else [f"{name}={rng.choice(_VALUES)}"]
    choices = list(action.choices or ())
    value = rng.choice(choices) if choices and rng.random() < 0.5 else rng.choice(_VALUES)
    return [f"{name}={value}"] if name.startswith("--") and rng.random() < 0.5 else [name, value]
