"""The compile stage: planned in advance, written completely or not at all, and compared."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from latentforge.__main__ import main
from latentforge.commands.arguments import parse_ranges
from latentforge.runtime import backends
from latentforge.runtime.compile.build_process import BuildOrder, build
from latentforge.runtime.compile.plan import CompileRequest, plan_compilation
from latentforge.runtime.compile.stage import compile_engines
from latentforge.runtime.errors import (
    BackendError,
    ForeignEngineError,
    GateError,
    ManifestError,
    SettingsError,
    ShapeError,
    TargetError,
)
from latentforge.runtime.files import hash_file
from latentforge.runtime.image import psnr
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.shapes import Range, Sizes

Snapshot = dict[str, bytes]


def contents(directory: Path) -> Snapshot:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def sizes(**texts: str) -> Sizes:
    return Sizes(**{name: parse_ranges(text) for name, text in texts.items()})


def test_a_compiled_directory_is_complete(tiny_engines: Path, tmp_path: Path) -> None:
    before = contents(tiny_engines)
    target = tmp_path / "compiled"
    compile_engines(
        tiny_engines, target, CompileRequest(backend="onnxruntime", sizes=sizes(batch="2"))
    )
    assert contents(tiny_engines) == before
    manifest = Manifest.read(target)
    assert manifest.components["denoiser"].file == "engines/onnxruntime/denoiser.onnx"
    assert manifest.components["denoiser"].inputs["sample"].shape[0] == 2
    assert manifest.components["text_encoder"].inputs["input_ids"].shape[0] == 1
    stage = manifest.history[-1]
    assert stage.name == "compile" and stage.options["batch"] == "2"
    assert stage.measured["image"]["latents_psnr"] > 100
    assert stage.measured["denoiser"]["build_memory"] > 1e6
    with load(target) as ours, load(tiny_engines) as theirs:
        request: dict[str, Any] = {"steps": 2, "seed": 3, "height": 64, "width": 32}
        results = [pipe(["red apple", "owl"], **request) for pipe in (ours, theirs)]
        assert psnr(results[1].latents, results[0].latents) > 100


def test_a_backend_for_one_component(tiny_engines: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    target = tmp_path / "mixed"
    compile_engines(
        tiny_engines,
        target,
        CompileRequest(
            backend="onnxruntime",
            component_backends={"denoiser": "openvino"},
            options=("hint=latency", "precision=bf16"),
        ),
    )
    manifest = Manifest.read(target)
    assert {n: c.backend for n, c in manifest.components.items() if n != "denoiser"}.keys() == {
        "text_encoder",
        "vae_decoder",
        "vae_encoder",
    }
    assert manifest.components["denoiser"].backend == "openvino"
    assert dict(manifest.components["denoiser"].options) == {
        "hint": "latency",
        "precision": "bf16",
    }
    precisions = {name: component.precision for name, component in manifest.components.items()}
    assert precisions.pop("denoiser") == "bf16" and set(precisions.values()) == {"fp32"}
    assert not manifest.components["text_encoder"].options
    assert manifest.components["denoiser"].data
    with load(target, threads=1, spin=False) as pipeline:
        assert set(pipeline.versions()) == {"onnxruntime", "openvino"}
        pipeline("red apple", steps=1)


def test_several_sizes(tiny_engines: Path, tmp_path: Path) -> None:
    target = tmp_path / "buckets"
    compile_engines(
        tiny_engines,
        target,
        CompileRequest(backend="onnxruntime", sizes=sizes(height="32,64", width="32", batch="1,2")),
    )
    unet = Manifest.read(target).components["denoiser"]
    assert unet.inputs["sample"].shape[3] == 16 and len(unet.shapes) == 4
    with load(target) as pipeline:
        for height in (32, 64):
            assert pipeline("owl", steps=1, height=height, width=32).images[0].size == (32, height)
        with pytest.raises(ShapeError, match="make images of 32x32, 64x32 pixels .* not 64x64"):
            pipeline("owl", steps=1, height=64, width=64)


def test_the_plan_shows_memory_and_disk_space(
    tiny_engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compile", str(tiny_engines), str(tmp_path / "out"), "--backend", "onnxruntime"]
    assert main([*arguments, "--dry-run", "--height", "32,64"]) == 0
    said = capsys.readouterr().out
    assert "denoiser: onnxruntime, fp32, for latent_height 16 or latent_height 32" in said
    assert "of memory to build" in said and "free" in said and "on the disk about" in said
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_a_backend_that_needs_sizes(tiny_engines: Path) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    parts = {
        p.name: p.component
        for p in plan_compilation(tiny_engines, CompileRequest(backend="tensorrt-rtx")).tasks
    }
    assert parts["denoiser"].inputs["sample"].shape[2:] == (16, 16)  # the model's own
    assert parts["denoiser"].shapes == ({"batch": Range(1, 2, 2)},)
    assert parts["vae_decoder"].inputs["latent_sample"].shape == (1, 4, 16, 16)
    assert parts["text_encoder"].free_dimensions == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "turbo"], "no backend 'turbo'; there are null"),
        (["--backend", "null", "--backend", "onnxruntime"], "one --backend NAME for all"),
        (["--backend", "unet=null"], "one --backend NAME for all"),
        (["--backend", "null", "--backend", "decoder=null"], "no component 'decoder'"),
        (["--backend", "null", "--option", "level"], "KEY=VALUE"),
        (["--backend", "null", "--option", "level=3"], "no backend option 'level'"),
        (["--backend", "null", "--option", "threads=3"], "not stored in them"),
        (["--backend", "onnxruntime", "--option", "prepack=maybe"], "prepack must be of type bool"),
        (["--backend", "null", "--height", "33"], "height must be a multiple of 2 "),
        (["--backend", "null", "--height", "512:64"], "MIN:OPT:MAX"),
        (["--backend", "null", "--batch", "0"], "from 1 up"),
        (["--backend", "null", "--batch", ",".join(map(str, range(1, 40)))], "39 sizes are too"),
    ],
)
def test_bad_input_is_refused_before_work_begins(
    tiny_engines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["compile", str(tiny_engines), str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_libraries_are_named(tiny_engines: Path, tmp_path: Path) -> None:
    missing = [name for name, entry in backends.BACKENDS.items() if not importable(entry.library)]
    if not missing:
        pytest.skip("everything is installed")
    for name in missing:
        extra = backends.BACKENDS[name].extra
        with pytest.raises(BackendError, match=rf"pip install 'latentforge\[{extra}\]'"):
            compile_engines(tiny_engines, tmp_path / "out", CompileRequest(backend=name))
    assert list(tmp_path.iterdir()) == []


def importable(library: str) -> bool:
    try:
        __import__(library)
    except ImportError:
        return False
    return True


def test_graphs_with_fixed_sizes(tiny_engines: Path, tmp_path: Path, copy: Any) -> None:
    directory = copy(tiny_engines)
    manifest = Manifest.read(directory)
    unet = manifest.components["denoiser"].specialize(({"latent_height": Range.of(16)},))
    components = {**manifest.components, "denoiser": unet}
    msgspec.structs.replace(manifest, components=components).write(directory)
    with pytest.raises(ShapeError, match="height 64 contradicts the graphs, which are fixed to 32"):
        plan_compilation(directory, CompileRequest(backend="onnxruntime", sizes=sizes(height="64")))
    with pytest.raises(ShapeError, match="height 32,64 contradicts"):
        plan_compilation(
            directory, CompileRequest(backend="onnxruntime", sizes=sizes(height="32,64"))
        )
    plan_compilation(directory, CompileRequest(backend="onnxruntime", sizes=sizes(height="32")))


def test_nothing_is_compiled_twice(tiny_engines: Path, tmp_path: Path) -> None:
    compile_engines(tiny_engines, tmp_path / "once", CompileRequest(backend="onnxruntime"))
    with pytest.raises(ManifestError, match="compiled already"):
        compile_engines(tmp_path / "once", tmp_path / "twice", CompileRequest(backend="null"))
    with pytest.raises(TargetError, match="is the source directory: name another"):
        compile_engines(tiny_engines, tiny_engines, CompileRequest(backend="null", overwrite=True))
    with pytest.raises(TargetError, match="--overwrite"):
        compile_engines(tiny_engines, tmp_path / "once", CompileRequest(backend="null"))
    assert sorted(os.listdir(tmp_path)) == ["once"]


def test_graphs_for_another_target(tiny_engines: Path, tmp_path: Path) -> None:
    from latentforge.optimize.stage.request import OptimizeRequest
    from latentforge.optimize.stage.stage import optimize

    request = OptimizeRequest(repeats=0, gate=("images=1",), settings={"steps": 1})
    optimize(tiny_engines, tmp_path / "cpu", request)
    if importable("openvino"):
        with pytest.raises(SettingsError, match="openvino lacks: .* --target openvino"):
            plan_compilation(tmp_path / "cpu", CompileRequest(backend="openvino"))
    plan_compilation(tmp_path / "cpu", CompileRequest(backend="onnxruntime"))


def test_a_different_image_is_rejected(tiny_engines: Path, tmp_path: Path) -> None:
    """The null backend, which returns zeros, does not reach the bound."""
    with pytest.raises(GateError, match=r"psnr of one step is .* dB .* kept as .*rejected"):
        compile_engines(tiny_engines, tmp_path / "out", CompileRequest(backend="null"))
    assert sorted(os.listdir(tmp_path)) == ["out.rejected"]


def test_a_damaged_graph(tiny_engines: Path, tmp_path: Path, copy: Any) -> None:
    """A truncated file is refused by its size, and with a matching manifest by the library."""
    directory = copy(tiny_engines)
    path = directory / "denoiser.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ManifestError, match="the file was truncated"):
        compile_engines(directory, tmp_path / "out", CompileRequest(backend="onnxruntime"))
    manifest = json.loads((directory / "manifest.json").read_text())

    manifest["components"]["denoiser"] |= {"bytes": 1000, "sha256": hash_file(path)}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    before = contents(directory)
    with pytest.raises(BackendError, match=r"denoiser\.onnx"):
        compile_engines(directory, tmp_path / "out", CompileRequest(backend="onnxruntime"))
    assert contents(directory) == before
    assert not (tmp_path / "out").exists()


def order(tiny_engines: Path, tmp_path: Path, backend: str) -> BuildOrder:
    component = Manifest.read(tiny_engines).components["denoiser"]
    return BuildOrder(
        onnx=str(tiny_engines / "denoiser.onnx"),
        target=str(tmp_path / "unet.engine"),
        component=msgspec.structs.replace(component, backend=backend),
    )


def silent(what: str, done: int, total: int) -> None:
    """Ignore the progress of a build."""


WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
from latentforge.runtime.compile.build_process import BuildOrder, build
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import TensorSpec

backend, onnx, target = sys.argv[1:]
inputs, outputs = {"i": TensorSpec("int64", (4,))}, {"y": TensorSpec("float32", (4, 1))}
made = dict(file="m.onnx", sha256="0" * 64, bytes=0, precision="fp32")
component = Component(backend=backend, inputs=inputs, outputs=outputs, **made)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
try:
    build(BuildOrder(onnx=onnx, target=target, component=component), lambda *_: None)
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt-rtx"])
def test_a_build_that_runs_out_of_memory(tmp_path: Path, backend: str) -> None:
    """Weights of 8 GB, in a sparse file, in a process that may have 6 GB."""
    pytest.importorskip(backends.BACKENDS[backend].library, exc_type=ImportError)
    weight = onnx.TensorProto(name="w", data_type=1, dims=[2_000_000_000, 1], data_location=1)
    for key, value in {"location": "w.bin", "offset": "0", "length": "8000000000"}.items():
        weight.external_data.add(key=key, value=value)
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Gather", ["w", "i"], ["y"])
    tensors = [info("i", 7, [4])], [info("y", 1, [4, 1])]
    graph = onnx.helper.make_graph([node], "m", *tensors, [weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(8_000_000_000)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / f"m{backends.get(backend).SUFFIX}"
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, backend, str(tmp_path / "m.onnx"), str(target)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (tmp_path / "w.bin").unlink()
    assert "out of memory" in result.stdout and result.stdout.count("\n") == 1
    assert list(target.parent.iterdir()) == []


def test_a_build_process_that_is_killed(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def killed(*arguments: Any, **options: Any) -> Any:
        process = real(*arguments, **options)
        process.send_signal(signal.SIGKILL)
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    with pytest.raises(BackendError, match="build of unet was ended by .* out of memory"):
        build(order(tiny_engines, tmp_path, "null"), silent)
    assert len(started) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(
    tiny_engines: Path, tmp_path: Path, how: signal.Signals
) -> None:
    command = [sys.executable, "-m", "latentforge", "compile", str(tiny_engines)]
    process = subprocess.Popen(
        [*command, str(tmp_path / "out"), "--backend", "onnxruntime"], stderr=subprocess.PIPE
    )
    wait_for(lambda: any(tmp_path.iterdir()))
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in said
    assert list(tmp_path.iterdir()) == []


def foreign(directory: Path, device: dict[str, str]) -> None:
    """Record another device for every engine."""
    manifest = Manifest.read(directory)
    components = {
        name: msgspec.structs.replace(component, device=device)
        for name, component in manifest.components.items()
    }
    msgspec.structs.replace(manifest, components=components).write(directory)


def test_engines_for_another_device_name_the_command_to_rebuild(
    tiny_engines: Path, tmp_path: Path
) -> None:
    target = tmp_path / "it's mine"
    compile_engines(
        tiny_engines,
        target,
        CompileRequest(
            backend="onnxruntime", options=("optimized=true",), sizes=sizes(height="32,64")
        ),
    )
    foreign(target, {"library": "onnxruntime 0.9", "cpu": "sse9"})
    with pytest.raises(ForeignEngineError) as caught:
        load(target)
    said = str(caught.value)
    assert "text_encoder: " in said and "library onnxruntime 0.9 (here onnxruntime 1." in said
    assert "cpu sse9 (here " in said and "\n" not in said
    command = said.partition("build it for this machine: latentforge ")[2]
    import shlex

    foreign(target, {})
    assert main(shlex.split(command)) == 0
    assert (
        Manifest.read(target).components["denoiser"].device["library"].startswith("onnxruntime 1.")
    )
    assert np.ptp(np.asarray(load(target)("owl", steps=1).images[0])) > 0


def test_the_timing_cache_survives_a_rebuild(tiny_engines: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    compile_engines(tiny_engines, target, CompileRequest(backend="onnxruntime"))
    cache = target / "engines" / "onnxruntime" / f"timing{backends.CACHE}"
    cache.write_bytes(b"measured")
    compile_engines(tiny_engines, target, CompileRequest(backend="onnxruntime", overwrite=True))
    assert cache.read_bytes() == b"measured"
    Manifest.read(target)


def test_a_manifest_cannot_set_options_of_loading(tiny_engines: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    compile_engines(tiny_engines, target, CompileRequest(backend="onnxruntime"))
    manifest = Manifest.read(target)
    components = {
        name: msgspec.structs.replace(component, options={"profile": True, "threads": 10**9})
        for name, component in manifest.components.items()
    }
    msgspec.structs.replace(manifest, components=components).write(target)
    with load(target) as pipeline:
        assert all(not engine.session.layers() for engine in pipeline.engines.values())
