"""Stable Diffusion 1.5 at full size with random weights: exports, runs, agrees, fits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentforge.runtime.image import psnr

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
UNET_BYTES = 4 * 859_520_964


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("full") / "sd15"
    script = ROOT / "benchmarks" / "checkpoints.py"
    subprocess.run([sys.executable, str(script), "sd15", str(target)], check=True)
    return target


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
    return target, int(result.stdout.splitlines()[-1])


def test_export_stays_under_two_and_a_half_times_the_weights(engines: tuple[Path, int]) -> None:
    target, peak = engines
    components = json.loads((target / "manifest.json").read_text())["components"]
    assert components["unet"]["data"][0]["bytes"] == pytest.approx(UNET_BYTES, rel=0.01)
    weights = sum(f["bytes"] for c in components.values() for f in (c, *c["data"]))
    assert peak < 2.5 * weights


def test_two_steps_at_512_match_eager(checkpoint: Path, engines: tuple[Path, int]) -> None:
    """Each side in a process of its own: both sets of weights at once would be wasteful."""
    latents = {side: checkpoint.parent / f"{side}.npy" for side in ("eager", "engines")}
    for side, path in latents.items():
        source = checkpoint if side == "eager" else engines[0]
        subprocess.run(
            [sys.executable, __file__, side, str(source), str(engines[0]), str(path)],
            check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    import numpy as np

    eager, ours = np.load(latents["eager"]), np.load(latents["engines"])
    assert ours.shape == (1, 4, 64, 64)
    assert psnr(eager, ours) >= 60


def _main(side: str, source: str, engines: str, output: str) -> None:
    """Two steps at 512x512 by one side, latents to a file."""
    import numpy as np

    import latentforge
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.settings import resolve

    defaults = Manifest.read(Path(engines), hashes=False).defaults
    settings = resolve(defaults, "red apple", {"steps": 2, "seed": 1, "height": 512, "width": 512})
    if side == "eager":
        from latentforge.export.checkpoint import open_checkpoint
        from latentforge.export.eager import EagerPipeline

        result = EagerPipeline(open_checkpoint(source))(settings)
    else:
        result = latentforge.load(source).run(settings)
        assert importlib.util.find_spec("torch") is None or "torch" not in sys.modules
    np.save(output, result.latents)


if __name__ == "__main__":
    _main(*sys.argv[1:])
