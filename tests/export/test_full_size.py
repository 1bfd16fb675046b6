"""Full-size models with random weights: memory of the export, images, and compilation."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.commands.describe import stage_lines
from latentforge.runtime.compile.plan import CompileRequest
from latentforge.runtime.compile.stage import compile_engines
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.shapes import Range, Sizes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """Full-size checkpoint, with a request and a memory limit.

    Attributes:
        unet: parameters of the denoiser.
        steps: of the request at 512 x 512.
        sampler: likewise.
        peak: largest memory of the export, in bytes; None for 2.5 times the weights.
        half: the checkpoint is in float16, as most are on the hub.
    """

    unet: int
    steps: int
    sampler: str
    peak: int | None = None
    half: bool = False


CASES = {
    "sd15": Case(unet=859_520_964, steps=2, sampler="pndm"),
    "deci1": Case(unet=814_746_884, steps=2, sampler="ddim"),
    "deci2": Case(unet=525_277_444, steps=2, sampler="dpmpp_2m"),  # 2 cannot be squeezed
    "sdxl": Case(unet=2_567_463_684, steps=1, sampler="euler", peak=20 * GIB, half=True),
}


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    script = ROOT / "benchmarks" / "checkpoints.py"
    half = ["--half"] if CASES[name].half else []
    command = [sys.executable, str(script), name, str(folder / name), *half]
    subprocess.run(command, check=True)
    yield folder / name
    shutil.rmtree(folder)  # gigabytes, and the next one needs the space


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> tuple[Path, int]:
    """The engines, and the peak memory of their export, in bytes."""
    target = checkpoint.parent / "engines"
    program = (
        "import sys; from latentforge.__main__ import main; status = main(sys.argv[1:]);"
        "from latentforge.runtime.machine import peak_memory; print(peak_memory());"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "export", str(checkpoint), str(target)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(result.stdout)
    return target, int(result.stdout.splitlines()[-1])


def test_export_fits_in_memory(name: str, engines: tuple[Path, int]) -> None:
    target, peak = engines
    case = CASES[name]
    components = json.loads((target / "manifest.json").read_text())["components"]
    assert components["denoiser"]["data"][0]["bytes"] == pytest.approx(4 * case.unet, rel=0.01)
    weights = sum(f["bytes"] for c in components.values() for f in (c, *c["data"]))
    assert peak < (case.peak or 2.5 * weights)


OPTIMIZE = (
    "import sys; from latentforge.__main__ import main;"
    "from latentforge.runtime.machine import MemoryMeter\n"
    "with MemoryMeter() as meter: status = main(sys.argv[1:])\n"
    "print(meter.peak); sys.exit(status)"
)


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_optimizing_at_512_fits_in_memory(
    name: str, engines: tuple[Path, int], target: str
) -> None:
    """The peak of all processes is below 2.5 times the denoiser's weights, and as estimated."""
    if name != "sd15":
        pytest.skip("takes too much time")
    # imported here, since the runtime's process must not need them
    from latentforge.build_plan import CheckpointSize
    from latentforge.measure.hardware import fit_together
    from latentforge.runtime.manifest import Manifest

    size = CheckpointSize.of_engines(Manifest.read(engines[0], hashes=False))
    pairs = 0 if fit_together([size.bytes] * 2) else 1  # where both fit, both are loaded
    request = f"--steps 1 --budget none --repeats {pairs} --height 512 --width 512"
    arguments = ["optimize", str(engines[0]), str(engines[0].parent / target), "--target", target]
    command = [sys.executable, "-c", OPTIMIZE, *arguments, "--gate", "images=1", *request.split()]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(engines[0].parent / target)
    peak = int(result.stdout.splitlines()[-1])
    print(f"optimize --target {target}: {peak / 1e9:.2f} GB")
    assert peak < 2.5 * size.denoiser
    assert peak == pytest.approx(size.judged_memory(), rel=0.2)


@pytest.mark.parametrize("width", [512, 520])  # 520 is no multiple of 64
def test_steps_at_512_match_eager(
    name: str, checkpoint: Path, engines: tuple[Path, int], width: int
) -> None:
    """Each participant runs in a separate process, so that only one set of weights is loaded."""
    if width != 512 and name != "sd15":
        pytest.skip("takes too much time")
    eager = by_side("eager", name, checkpoint, engines[0], width)
    ours = by_side("engines", name, engines[0], engines[0], width)
    assert ours["latents"].shape == (1, 4, 64, width // 8)
    figure = psnr(eager["latents"], ours["latents"])
    print(f"{name}: latents within {figure:.1f} dB")
    assert figure >= 60


def by_side(side: str, name: str, source: Path, engines: Path, width: int = 512) -> dict[str, Any]:
    """Return latents and pixels of a few steps, computed in a separate process."""
    output = source.parent / f"{side}.npz"
    subprocess.run(
        [sys.executable, __file__, side, name, str(source), str(engines), str(output), str(width)],
        check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    with np.load(output) as arrays:
        return dict(arrays)


COMPILED = ("sd15", "deci1")  # the others take too much time and memory
SIZES = {
    "dynamic": Sizes(),
    "static": Sizes(height=(Range.of(512),), width=(Range.of(512),), batch=(Range.of(2),)),
}


@pytest.fixture(scope="module")
def picture(name: str, engines: tuple[Path, int]) -> dict[str, Any]:
    """Latents and pixels of the exported graphs with ONNX Runtime."""
    return by_side("engines", name, engines[0], engines[0])


@pytest.mark.parametrize("sizes", SIZES)
def test_openvino_makes_the_same_image(
    name: str, engines: tuple[Path, int], picture: dict[str, Any], sizes: str
) -> None:
    pytest.importorskip("openvino")
    if name not in COMPILED:
        pytest.skip("not compiled at full size")
    target = engines[0].parent / f"openvino-{sizes}"
    compile_engines(engines[0], target, CompileRequest(backend="openvino", sizes=SIZES[sizes]))
    made = by_side("engines", name, target, engines[0])
    shutil.rmtree(target)
    figures = {key: psnr(picture[key], made[key]) for key in ("latents", "pixels")}
    print(f"{name}, {sizes}: {figures}")
    assert min(figures.values()) >= 40


def test_tensorrt_rtx_builds_its_engines(name: str, engines: tuple[Path, int]) -> None:
    pytest.importorskip("tensorrt_rtx")
    if name not in COMPILED:
        pytest.skip("not compiled at full size")
    # imported here, since the runtime's process must not need them
    from latentforge.optimize.stage.request import OptimizeRequest
    from latentforge.optimize.stage.stage import optimize

    optimized, target = (engines[0].parent / part for part in ("optimized", "tensorrt-rtx"))
    request = OptimizeRequest(
        target="tensorrt-rtx",
        recipe="fp16",
        gate=("images=1",),
        settings={"steps": 1, "sampler": "euler", "height": 256, "width": 256},
        repeats=0,
    )
    optimize(engines[0], optimized, request)
    manifest = compile_engines(
        optimized, target, CompileRequest(backend="tensorrt-rtx", options=("capabilities=8.6",))
    )
    print("\n".join(stage_lines(manifest.history[-1])))
    half = 2 * CASES[name].unet
    assert (
        half < sum(c.size for n, c in manifest.components.items() if "denoiser" in n) < 1.2 * half
    )
    for folder in (optimized, target):
        shutil.rmtree(folder)


def _main(side: str, name: str, source: str, engines: str, output: str, width: str) -> None:
    """Run a few steps at a height of 512, and save latents and pixels."""
    import latentforge
    from latentforge.runtime.machine import peak_memory
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.settings import resolve

    case = CASES[name]
    defaults = Manifest.read(Path(engines), hashes=False).defaults
    settings = resolve(
        defaults,
        "red apple",
        {
            "steps": case.steps,
            "sampler": case.sampler,
            "seed": 1,
            "height": 512,
            "width": int(width),
        },
    )
    if side == "eager":
        from latentforge.export.checkpoint import open_checkpoint
        from latentforge.export.reference.eager import EagerPipeline

        result = EagerPipeline(open_checkpoint(source))(settings)
    else:
        result = latentforge.load(source, low_memory=True).run(settings)
        assert importlib.util.find_spec("torch") is None or "torch" not in sys.modules
    np.savez(output, latents=result.latents, pixels=to_array(result.images))
    print(f"{side}: {result.timings}, peak memory {peak_memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    _main(*sys.argv[1:])
