"""Calls of the Python API with one to three hostile arguments, by number.

No call may begin heavy work: handmade engines run in microseconds, and the stages that would take
long end at the last of their checks, for a reason of their own.
"""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from hostile_settings import VALUES
from measured import BENCH, EVAL

from latentforge.benchmark import BenchRequest, benchmark
from latentforge.build import BuildRequest, build, estimate, with_demo_metrics
from latentforge.demo import run_demo
from latentforge.evaluate import evaluate
from latentforge.export.onnx import Dimensions
from latentforge.export.stage import ExportRequest, export
from latentforge.measure.prompts import read_prompts
from latentforge.measure.quality import distribution
from latentforge.measure.quality.request import EvalRequest
from latentforge.measure.regression import judge
from latentforge.measure.report import render
from latentforge.measure.results import Results
from latentforge.optimize.recipe import read_recipe
from latentforge.optimize.search.request import SearchRequest, check_search
from latentforge.optimize.stage.job import check_request
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.stage import optimize
from latentforge.runtime.compile.plan import CompileRequest, plan_compilation
from latentforge.runtime.compile.stage import compile_engines
from latentforge.runtime.compile.verify import verify
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.shapes import Range, Sizes

__all__ = ["NAMES", "Places", "call", "describe", "write_files"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Places:
    """Directories that calls are about.

    Attributes:
        engines: handmade engines, which run and have no graphs.
        checkpoint: complete.
        broken: a checkpoint that lacks weights alone.
    """

    engines: Path
    checkpoint: Path
    broken: Path


_RECIPE = 'summary = "x"\n'
_TEXTS: Mapping[str, bytes] = {
    "nan.toml": f"{_RECIPE}[gate]\npsnr = nan".encode(),
    "inf.toml": f"{_RECIPE}[gate]\nssim = inf".encode(),
    "images.toml": f"{_RECIPE}[gate]\nimages = 99999999999999999999".encode(),
    "digits.toml": f"{_RECIPE}[gate]\nimages = {'9' * 5000}".encode(),
    "samples.toml": f"{_RECIPE}[calibration]\nsamples = 99999999999999999999".encode(),
    "deep.toml": f"{_RECIPE}a = {'[' * 100_000}".encode(),
    "tables.toml": f"{_RECIPE}{'[a]' * 1000}".encode(),
    "date.toml": f"{_RECIPE}candidates = [2020-01-01]".encode(),
    "candidates.toml": f'{_RECIPE}candidates = ["candidates.toml", "zero", "fifo"]'.encode(),
    "escape.toml": f'{_RECIPE}"\\u001b[31m" = 1'.encode(),
    "network.toml": f'{_RECIPE}[gate]\nperceptual = 1.0\nnetwork = "fifo"'.encode(),
    "multiple.toml": f"{_RECIPE}[prune]\nchannels = 0.5\nchannel_multiple = {10**30}".encode(),
    "precision.toml": f'{_RECIPE}[precision]\n"a\\u0000" = "int8"'.encode(),
    "block.toml": f"{_RECIPE}[weight_only]\nblock_size = {2**80}".encode(),
    "alpha.toml": f"{_RECIPE}[int8]\nsmoothquant_alpha = nan\nsplit_concat = inf".encode(),
    "recipe.json": b'{"summary": "x"}',
    "empty": b"",
    "binary": bytes(range(256)) * 9,
    "prompts.txt": b"a red apple\n\x1b[31m\n" + b"a " * 100_000,
    "blank.txt": b"\n \n\t\n",
    "captions.tsv": b"caption\nx\ty\tz\n" + b'"' * 1000,
    "pickle.pth": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "array.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, "
    b"'shape': (1, 1099511627776), }".ljust(128)
    + b"\n",
}


def write_files(place: Path) -> None:
    """Write the files and other entries that hostile arguments name, into an empty folder."""
    for name, content in _TEXTS.items():
        (place / name).write_bytes(content)
    os.mkfifo(place / "fifo")
    (place / "folder").mkdir()
    for name, target in (("zero", "/dev/zero"), ("loop", "loop"), ("nothing", "/nowhere")):
        (place / name).symlink_to(target)
    (place / "sparse").touch()
    os.truncate(place / "sparse", 1 << 40)


NAMES: tuple[Any, ...] = (
    *_TEXTS,
    *("fifo", "folder", "zero", "loop", "nothing", "sparse", "fifo/x", "empty/x", "x" * 300),
    *("a/" * 3000, "../" * 50, "~", ".", "", " ", "FP32", "Int8", "CPU", "Cpu ", "cuda", "auto"),
    *("tensorrt", "openvino", "OpenVINO", "onnxruntime", "null", "plain", "PLAIN", "optimum"),
    *("int8", "fastest", "efficientnet-lite0", "mlperf", "eager", "sd-cpp", "org/model@\0", "psnr"),
)
_LISTS: tuple[Any, ...] = (
    *(("psnr=nan",), ("psnr=1e999",), ("images=" + "9" * 30,), ("images=x",), ("=",), ("psnr",)),
    *(("perceptual=1", "network=fifo"), ("perceptual=1", "network=binary"), ("ssim=2",), ("\0=1",)),
    *(("colour=1",), ("max_relative_error=-1",), ("psnr=20", "psnr=\ud800"), ["psnr=20"] * 10_000),
    *(("threads=1",), ("threads=x",), ("threads=" + "9" * 5000,), ("device=\x1b[31m",), ("=1",)),
    *(("denoiser",), ("DENOISER",), ("vae_encoder",), ("psnr",), ("ppl", "fid"), ("eager",)),
    *(("a",), ("a " * 10_000,), ("",), ("\ud800",), ("a", None), "abc", (Path("fifo"),)),
    *({"steps": float("nan")}, {"steps": 3}, {"steps": "3"}, {"nonsense": 1}, {1: 2}, {"seed": -1}),
    *({"denoiser": "null"}, {"denoiser": 3}, {"x": "null"}, {"eager": "zero"}, {"height": 10**9}),
    *((Range.of(64),), Range.of(64), (Range.of(1 << 40),), Sizes(height=(Range.of(64),)), (64,)),
    *(Dimensions(height=64), OptimizeRequest(), SearchRequest(), ExportRequest(), BENCH, EVAL),
    *(np.zeros((4, 4)), np.full((3, 2), np.nan), np.zeros((3, 2), "M8[s]"), np.ones((2, 2)), {}),
)
_POOL: tuple[Callable[[], Any], ...] = (
    *VALUES,
    *(lambda value=value: value for value in (*NAMES, *_LISTS)),
    *(lambda value=value: Path(value) for value in ("fifo", "folder", "zero", "binary", "a\0b")),
)


_PLAUSIBLE: Mapping[str, tuple[Any, ...]] = {
    "tuple": tuple(item for item in _LISTS if isinstance(item, tuple)),
    "Sequence": tuple(item for item in _LISTS if isinstance(item, tuple)),
    "Mapping": tuple(item for item in _LISTS if isinstance(item, dict)),
    "Request": ({}, {"steps": 3}, {"steps": 0}, {"sampler": "x"}, {"height": 10**9}, {"seed": "a"}),
    "bool": (True, False, np.True_),
    "int": (0, 1, 2, 3, 6, -1, 64, 1000, 4096, 16_385, 2**31, 2**63, 10**5000, np.int64(8)),
    "float": (0, 0.5, 1, 60.0, 1e308, float("nan"), float("inf"), -0.0, 10**5000, np.float32(3)),
    "Path": tuple(map(Path, NAMES)),
    "str": NAMES,
}
"""Values of the right type, by a word of the annotation."""


def _value(rng: random.Random, annotation: str) -> Any:
    """Return a value of any type, or as often one of the right type."""
    kinds = [values for word, values in _PLAUSIBLE.items() if word in annotation]
    return rng.choice(kinds[0]) if kinds and rng.random() < 0.5 else rng.choice(_POOL)()


def _calls(places: Places) -> Mapping[str, tuple[Function, Mapping[str, Any]]]:
    """Return what is called: a function, and its arguments unless they are replaced."""
    engines, missing = places.engines, Path("missing")
    broken, target = str(places.broken), Path("target")
    pipeline = _Once(lambda: load(engines))
    features = np.random.default_rng(0).normal(size=(4, 3))
    pairs = {"candidate": features, "reference": features + 1, "paired": False, "seed": 0}
    return {
        "export": (export, {"source": broken, "target": target, "request": ExportRequest()}),
        "optimize": (
            optimize,
            {"source": engines, "target": target, "request": OptimizeRequest()},
        ),
        "compile": (
            compile_engines,
            {"source": engines, "target": target, "request": CompileRequest(backend="tensorrt")},
        ),
        "build": (build, {"checkpoint": broken, "target": target, "request": BuildRequest()}),
        "estimate": (estimate, {"checkpoint": broken, "request": BuildRequest()}),
        "evaluate": (evaluate, {"engines": [engines, missing], "request": EvalRequest()}),
        "benchmark": (benchmark, {"request": BenchRequest(engines=[engines, missing])}),
        "load": (load, {"directory": engines, "hashes": True, "max_rows": 1, "threads": 1}),
        "verify": (lambda directory: list(verify(directory)), {"directory": engines}),
        "demo": (lambda **k: run_demo(Path("empty"), **k), {"images": 1, "repeats": 1}),
        "render": (lambda one, other: render(one, other), {"one": BENCH, "other": EVAL}),
        "judge": (judge, {"old": BENCH, "new": BENCH, "tolerance": 0.05}),
        "results": (Results.read, {"path": Path("binary")}),
        "manifest": (Manifest.read, {"directory": engines, "hashes": True}),
        "recipe": (read_recipe, {"name": "fp32"}),
        "prompts": (read_prompts, {"path": None}),
        "accuracies": (
            with_demo_metrics,
            {"checkpoint": "demo", "request": SearchRequest(), "training_images": None},
        ),
        "statistics": (distribution.Statistics.read, {"path": Path("binary")}),
        "fid": (distribution.fid, pairs),
        "kid": (distribution.kid, pairs),
        "cmmd": (distribution.cmmd, pairs),
        "is": (distribution.inception_score, {"logits": features, "seed": 0}),
        "clip": (
            distribution.clip_score,
            {"pictures": features, "texts": features, "seed": 0},
        ),
        "range": (Range, {"min": 1, "opt": 2, "max": 3}),
        "pipeline": (lambda **k: pipeline().run(**k), {"settings": _settings(pipeline)}),
        "encode": (lambda **k: pipeline().encode(**k), {"settings": _settings(pipeline)}),
        "repetitions": (
            lambda **k: pipeline().benchmark(**k),
            {"batch_size": 1, "repetitions": 1, "steps": 1},
        ),
        "profile": (lambda **k: pipeline().profile(**k), {"prompt": "a", "steps": 1}),
        "decode": (lambda **k: pipeline().decode(**k), {"latents": np.zeros((1, 4, 4, 6))}),
        "engine": (lambda **k: pipeline().load_engine(**k), {"name": "denoiser"}),
    }


def _requests(places: Places) -> Mapping[Any, tuple[Function, Mapping[str, Any]]]:
    """Return by class of requests what takes one, and its fields unless they are replaced."""
    engines, broken = places.engines, str(places.broken)
    several = [engines, Path("missing")]

    def optimized(request: OptimizeRequest) -> None:
        check_request(request)
        optimize(engines, Path("target"), request)

    def searched(request: SearchRequest) -> None:
        check_search(request, "cpu")
        str(request)

    def planned(**fields: Any) -> None:
        str(plan_compilation(engines, CompileRequest(backend="onnxruntime", **fields)))

    return {
        ExportRequest: (lambda request: export(broken, Path("target"), request), {}),
        OptimizeRequest: (optimized, {}),
        CompileRequest: (
            lambda request: str(plan_compilation(engines, request)),
            {"backend": "onnxruntime"},
        ),
        BuildRequest: (lambda request: str(estimate(str(places.checkpoint), request)), {}),
        SearchRequest: (searched, {}),
        BenchRequest: (benchmark, {"engines": several}),
        EvalRequest: (lambda request: evaluate(several, request), {}),
        Sizes: (lambda sizes: planned(sizes=sizes), {}),
        Dimensions: (
            lambda sizes: export(broken, Path("target"), ExportRequest(dimensions=sizes)),
            {},
        ),
    }


class _Once:
    """Function that makes a value when it is called first."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: list[Any] = []

    def __call__(self) -> Any:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]


def _chosen(index: int, places: Places) -> tuple[str, Function, dict[str, Any]]:
    """Return the name of a case, the function to call, and its arguments."""
    rng = random.Random(index)
    if index % 10 == 9:
        return _damaged_results(rng)
    tables: tuple[Mapping[Any, tuple[Function, Mapping[str, Any]]], ...]
    tables = _calls(places), _requests(places)
    table = tables[index % 10 < 6]
    key = rng.choice(list(table))
    function, valid = table[key]
    if table is tables[0]:
        kinds = {name: type(value).__name__ for name, value in valid.items()}
    else:
        kinds = {field.name: str(field.type) for field in fields(key)}
    chosen = rng.sample(list(kinds), min(len(kinds), rng.choice((1, 1, 1, 2, 3))))
    arguments = {**valid, **{name: _value(rng, kinds[name]) for name in chosen}}
    if table is tables[0]:
        return f"{key}: {', '.join(chosen)}", function, arguments
    return (
        f"{key.__name__}: {', '.join(chosen)}",
        lambda **given: function(key(**given)),
        arguments,
    )


def call(index: int, places: Places) -> None:
    """Make the call of an index."""
    _, function, arguments = _chosen(index, places)
    function(**arguments)


def describe(index: int, places: Places) -> str:
    """Return the name of a case, and its arguments in short."""
    name, _, arguments = _chosen(index, places)
    shown = {}
    for key, value in arguments.items():
        with suppress(ValueError):  # an integer of too many digits
            shown[key] = repr(value)[:80]
    return f"{name} {shown}"


_JSON = (
    *("null", "true", "-1", "0", "1e308", "1e999", "9" * 5000, '""', '"\\ud800"', '"\\u001b[31m"'),
    *('"<script>"', "[]", "{}", "[null]", '{"a": 1}', "[" * 90 + "]" * 90, '"' + "x" * 10**5 + '"'),
    *(
        "0.5",
        "1e-320",
        "-0.0",
        "99999999999999999999",
        '"data:image/png;base64,x"',
        "NaN",
        "[1, 2]",
    ),
)


def _damaged_results(rng: random.Random) -> tuple[str, Function, dict[str, Any]]:
    """Return a case of a result file of which a value is replaced: read, drawn and compared."""
    results = rng.choice((BENCH, EVAL))
    document = json.loads(results.encode())
    place, text = rng.choice(list(_values(document))), rng.choice(_JSON)
    node = document
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = "@HERE@"

    def read(content: str) -> None:
        path = Path("damaged.json")
        try:
            path.write_text(content)
            damaged = Results.read(path)
        finally:
            path.unlink()
        render(damaged)
        str(judge(results, damaged))

    content = json.dumps(document).replace('"@HERE@"', text)
    return f"results: {place} = {text[:40]}", read, {"content": content}


def _values(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in a JSON document, except that of the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from _values(item, (*path, key))


def _settings(pipeline: _Once) -> Any:
    return pipeline().settings("a red apple", steps=1)
