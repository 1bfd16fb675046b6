"""Full-size models with random weights: they export, run, agree with diffusers, and fit."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from latentforge.runtime.image import psnr

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, a run of it, and what it may take.

    Attributes:
        unet: parameters of the denoiser.
        steps, sampler: of the run at 512 x 512.
        peak: of memory while exporting, in bytes; None for 2.5 times the weights.
        half: whether the checkpoint is in float16, as hubs mostly have it.
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
    shutil.rmtree(folder)  # of gigabytes, and the next one's come


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> tuple[Path, int]:
    """The engines, and the most memory that exporting them took, in bytes."""
    target = checkpoint.parent / "engines"
    program = (
        "import sys; from latentforge.__main__ import main; status = main(sys.argv[1:]);"
        "from latentforge.runtime.bench import peak_memory; print(peak_memory()); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "export", str(checkpoint), str(target)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(result.stdout)
    return target, int(result.stdout.splitlines()[-1])


def test_export_fits_in_memory(name: str, engines: tuple[Path, int]) -> None:
    target, peak = engines
    case = CASES[name]
    components = json.loads((target / "manifest.json").read_text())["components"]
    assert components["unet"]["data"][0]["bytes"] == pytest.approx(4 * case.unet, rel=0.01)
    weights = sum(f["bytes"] for c in components.values() for f in (c, *c["data"]))
    assert peak < (case.peak or 2.5 * weights)


def test_steps_at_512_match_eager(name: str, checkpoint: Path, engines: tuple[Path, int]) -> None:
    """Each side in a process of its own: both sets of weights at once would be wasteful."""
    latents = {side: checkpoint.parent / f"{side}.npy" for side in ("eager", "engines")}
    for side, path in latents.items():
        source = checkpoint if side == "eager" else engines[0]
        subprocess.run(
            [sys.executable, __file__, side, name, str(source), str(engines[0]), str(path)],
            check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    import numpy as np

    eager, ours = np.load(latents["eager"]), np.load(latents["engines"])
    assert ours.shape == (1, 4, 64, 64)
    figure = psnr(eager, ours)
    print(f"{name}: latents within {figure:.1f} dB")
    assert figure >= 60


def _main(side: str, name: str, source: str, engines: str, output: str) -> None:
    """A few steps at 512 x 512 by one side, latents to a file."""
    import numpy as np

    import latentforge
    from latentforge.runtime.bench import peak_memory
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.settings import resolve

    case = CASES[name]
    defaults = Manifest.read(Path(engines), hashes=False).defaults
    settings = resolve(
        defaults,
        "red apple",
        {"steps": case.steps, "sampler": case.sampler, "seed": 1, "height": 512, "width": 512},
    )
    if side == "eager":
        from latentforge.export.checkpoint import open_checkpoint
        from latentforge.export.eager import EagerPipeline

        result = EagerPipeline(open_checkpoint(source))(settings)
    else:
        result = latentforge.load(source, low_memory=True).run(settings)
        assert importlib.util.find_spec("torch") is None or "torch" not in sys.modules
    np.save(output, result.latents)
    print(f"{side}: {result.timings}, peak memory {peak_memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    _main(*sys.argv[1:])
