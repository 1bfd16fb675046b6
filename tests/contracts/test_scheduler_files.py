"""Images by a checkpoint's own scheduler_config.json equal those of diffusers' own pipeline.

diffusers gets its scheduler from the file itself, without the table of counterparts.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiers import further

import latentforge
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.manifest import Manifest

diffusers = pytest.importorskip("diffusers")

from latentforge.export.checkpoint import open_checkpoint  # noqa: E402
from latentforge.export.reference.eager import EagerPipeline  # noqa: E402
from latentforge.export.schedulers import CheckpointScheduler, corrected  # noqa: E402
from latentforge.export.stage import export  # noqa: E402

# torch tensors and numpy 2 disagree on a keyword of __array__, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

V = {"prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2", **V}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **V}
LEADING = {**SCALED, "timestep_spacing": "leading", "steps_offset": 1}
KARRAS = {"use_karras_sigmas": True}
DPM, EULER = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"
FILES: list[tuple[str, dict[str, Any]]] = [
    (EULER, LEADING | KARRAS),
    (EULER, LEADING | {"use_exponential_sigmas": True}),
    (EULER, LEADING | {"use_beta_sigmas": True}),
    (EULER, LEADING | {"timestep_type": "continuous"}),
    (EULER, LEADING | {"final_sigmas_type": "sigma_min"}),
    (EULER, SCALED | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("EulerAncestralDiscreteScheduler", LEADING),
    ("HeunDiscreteScheduler", LEADING | KARRAS),
    ("LMSDiscreteScheduler", SCALED),
    ("KDPM2DiscreteScheduler", LEADING),
    ("KDPM2AncestralDiscreteScheduler", LEADING),
    (DPM, LEADING | KARRAS | {"algorithm_type": "sde-dpmsolver++"}),
    (DPM, LEADING | {"solver_order": 3}),
    (DPM, SCALED | {"use_lu_lambdas": True, "euler_at_final": True}),
    (DPM, COSINE | {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    (DPM, LEADING | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverSinglestepScheduler", SCALED),
    ("DEISMultistepScheduler", LEADING),
    ("UniPCMultistepScheduler", LEADING | KARRAS),
    ("UniPCMultistepScheduler", LEADING | {"solver_order": 3, "disable_corrector": [0]}),
    ("PNDMScheduler", LEADING),
    ("PNDMScheduler", LEADING | {"skip_prk_steps": True}),
    ("DDIMScheduler", COSINE | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("DDPMScheduler", SCALED),
    ("LCMScheduler", V),
    ("TCDScheduler", V),
    ("EDMEulerScheduler", V),
    ("EDMDPMSolverMultistepScheduler", V),
]
SAMPLE = [0, 3, 8, 10, 12, 16, 17, 19, 20, 25, 26, 27]  # one of each kind
IDS = [f"{name}-{len(options)}-{index}" for index, (name, options) in enumerate(FILES)]


class OwnScheduler(EagerPipeline):
    """diffusers' pipeline with the scheduler of the file, whichever sampler is requested."""

    def use(self, config: dict[str, Any]) -> None:
        public = {key: value for key, value in config.items() if key != "_class_name"}
        self.own = getattr(diffusers, config["_class_name"]).from_config(public)

    def _scheduler(self, sampler: str) -> Any:
        return copy.deepcopy(self.own)


@pytest.fixture(scope="module")
def eager() -> OwnScheduler:
    return OwnScheduler(open_checkpoint("demo"))


def worst(pipe: latentforge.Pipeline, eager: OwnScheduler, name: str) -> float:
    """Return the PSNR of an image to diffusers' own, in dB."""
    ours = pipe("red apple on a blue background", steps=4 if "LCM" in name else 8, seed=3)
    theirs = eager(ours.settings)
    return psnr(to_array(theirs.images), to_array(ours.images), peak=2.0)


@pytest.fixture
def pipes(demo_engines: Path, tmp_path: Path) -> Iterator[Any]:
    """Load the demo's engines with another scheduler in their manifest."""

    def load(config: dict[str, Any]) -> latentforge.Pipeline:
        scheduler = CheckpointScheduler.of(config)
        shutil.copytree(demo_engines, tmp_path / "engines", copy_function=os.link)
        manifest = Manifest.read(demo_engines, hashes=False)
        defaults = msgspec.structs.replace(manifest.defaults, sampler=scheduler.sampler)
        (tmp_path / "engines" / "manifest.json").unlink()
        msgspec.structs.replace(
            manifest,
            schedule=scheduler.schedule,
            prediction=scheduler.prediction,
            defaults=defaults,
        ).write(tmp_path / "engines")
        return latentforge.load(tmp_path / "engines", hashes=False)

    yield load


@pytest.mark.parametrize(
    ("name", "options"), [*FILES[::2], *further(*FILES[1::2])], ids=[*IDS[::2], *IDS[1::2]]
)
def test_same_image(pipes: Any, eager: OwnScheduler, name: str, options: dict[str, Any]) -> None:
    config = corrected({"_class_name": name, **options})
    eager.use(config)
    with pipes(config) as pipe:
        assert worst(pipe, eager, name) >= 40


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), FILES, ids=IDS)
def test_same_image_after_export(
    tmp_path: Path, eager: OwnScheduler, name: str, options: dict[str, Any]
) -> None:
    """The same from the checkpoint on, each with its own file."""
    config, checkpoint = {"_class_name": name, **options}, tmp_path / "checkpoint"
    shutil.copytree(open_checkpoint("demo").path, checkpoint)
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    sidecar = checkpoint / "latentforge.json"
    if sidecar.exists():
        fields = json.loads(sidecar.read_text())
        fields.get("defaults", {}).pop("sampler", None)
        sidecar.write_text(json.dumps(fields))
    manifest = export(str(checkpoint), tmp_path / "engines")
    assert manifest.schedule_proof is not None
    assert manifest.schedule_proof.scheduler == name
    eager.use(corrected(config))
    with latentforge.load(tmp_path / "engines", hashes=False) as pipe:
        assert worst(pipe, eager, name) >= 40
