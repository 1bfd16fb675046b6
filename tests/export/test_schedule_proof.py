"""Every option of a scheduler that a checkpoint can name is followed, or refused by name.

The proof of the schedule compares the runtime's sampler with diffusers' scheduler step by step. It
is run here over a grid of configurations of every class, and must itself notice a mistake.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("diffusers")

from latentforge.export import schedule_proof
from latentforge.export.schedule_proof import TOLERANCE, prove_schedule
from latentforge.export.schedulers import CheckpointScheduler
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.schedule import Schedule

Options = Sequence[Mapping[str, Any]]

NONE: Options = [{}]
SIGMAS: Options = [
    {},
    *({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")),
]
SPACING: Options = [
    {},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]
BETAS: Options = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {},
    {"beta_schedule": "squaredcos_cap_v2"},
]
OTHER_BETAS: Options = [{"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}]
PREDICTION: Options = [{"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}]
WITH_SAMPLE: Options = [*PREDICTION, {"prediction_type": "sample"}]
FINAL: Options = [{}, {"final_sigmas_type": "sigma_min"}]
CLIP: Options = [{}, {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 2.0}]
RESCALED: Options = [{}, {"rescale_betas_zero_snr": True}]
ENDS: Options = [{}, {"sigma_min": 0.1, "sigma_max": 9.0}]
ORDER: Options = [{}, {"solver_order": 1}, {"solver_order": 3}]
HEUN: Options = [{}, {"solver_type": "heun"}]
DISTILLED: Options = [{}, {"original_inference_steps": 100}]

GRID: Mapping[str, Sequence[Options]] = {
    "DDIMScheduler": [
        SPACING, BETAS, WITH_SAMPLE, CLIP, RESCALED, [{}, {"set_alpha_to_one": False}]
    ],
    "DDIMParallelScheduler": [SPACING, PREDICTION],
    "DDPMScheduler": [
        SPACING, [*BETAS, *OTHER_BETAS], WITH_SAMPLE, CLIP,
        [{}, {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"}],
    ],
    "PNDMScheduler": [
        SPACING, BETAS, PREDICTION, [{}, {"skip_prk_steps": True}], [{}, {"set_alpha_to_one": True}]
    ],
    "EulerDiscreteScheduler": [
        SPACING, BETAS, PREDICTION, SIGMAS, FINAL, ENDS,
        [{}, {"timestep_type": "continuous"}, {"interpolation_type": "log_linear"}],
    ],
    "EulerAncestralDiscreteScheduler": [SPACING, BETAS, PREDICTION, RESCALED],
    "HeunDiscreteScheduler": [SPACING, BETAS, PREDICTION, SIGMAS, CLIP],
    "LMSDiscreteScheduler": [SPACING, BETAS, PREDICTION, SIGMAS],
    "KDPM2DiscreteScheduler": [SPACING, BETAS, PREDICTION, SIGMAS],
    "KDPM2AncestralDiscreteScheduler": [SPACING, BETAS, PREDICTION, SIGMAS],
    "DPMSolverMultistepScheduler": [
        SPACING, BETAS, PREDICTION, [*SIGMAS, {"use_lu_lambdas": True}], FINAL, ORDER, HEUN, ENDS,
        [{}, *({"algorithm_type": f"{kind}"} for kind in ("sde-dpmsolver++", "dpmsolver"))],
        [{}, {"euler_at_final": True}, {"lower_order_final": False}, {"lambda_min_clipped": -5.1}],
    ],
    "DPMSolverSinglestepScheduler": [
        BETAS, PREDICTION, SIGMAS, FINAL, ORDER, HEUN,
        [{}, *({"algorithm_type": f"{kind}"} for kind in ("sde-dpmsolver++", "dpmsolver"))],
        [{}, {"lower_order_final": True}, {"lambda_min_clipped": -5.1}],
    ],
    "DEISMultistepScheduler": [SPACING, BETAS, PREDICTION, SIGMAS, ORDER],
    "UniPCMultistepScheduler": [
        SPACING, BETAS, PREDICTION, SIGMAS, FINAL, ORDER, [{}, {"solver_type": "bh1"}], RESCALED,
        [{}, {"predict_x0": False}, {"disable_corrector": [0, 1]}, {"lower_order_final": False}],
    ],
    "LCMScheduler": [BETAS, WITH_SAMPLE, CLIP, [*DISTILLED, {"timestep_scaling": 5.0}], RESCALED],
    "TCDScheduler": [BETAS, PREDICTION, DISTILLED],
    "EDMEulerScheduler": [
        PREDICTION, FINAL,
        [{"rho": 5}, {"sigma_schedule": "exponential"}, {"sigma_max": 120.0, "sigma_data": 1.0}],
    ],
    "EDMDPMSolverMultistepScheduler": [
        PREDICTION, FINAL, ORDER, HEUN, [{}, {"algorithm_type": "sde-dpmsolver++"}],
        [{}, {"sigma_schedule": "exponential"}, {"sigma_max": 120.0, "sigma_data": 1.0}],
        [{}, {"euler_at_final": True}, {"lower_order_final": False}],
    ],
}  # fmt: skip
SLOW = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler"}


def configurations(name: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` configurations of a class, spread at random over all of its combinations."""
    cases = list(itertools.product(*GRID[name]))
    for case in random.Random(name).sample(cases, min(count, len(cases))):
        options = {key: value for part in case for key, value in part.items()}
        yield {"_class_name": name, **options}


def outcome(config: Mapping[str, Any]) -> str:
    """Return how a configuration fares; any error but a CheckpointError goes through."""
    steps = 4 if config["_class_name"] in {"LCMScheduler", "TCDScheduler"} else 20
    try:
        proof = prove_schedule(CheckpointScheduler.of(config), steps)
    except CheckpointError as error:
        message = str(error)
        return next(
            (word for word in ("differ by", "no finite numbers") if word in message), message
        )
    assert proof.difference <= TOLERANCE
    assert steps in proof.steps
    return "equal"


@pytest.mark.parametrize("name", GRID)
def test_options_are_followed(name: str) -> None:
    """A sample: test_the_whole_grid has the others."""
    found = Counter(map(outcome, configurations(name, 3 if name in SLOW else 12)))
    assert found["equal"] >= 2
    assert not found["differ by"]


def whole(name: str) -> list[dict[str, Any]]:
    return list(configurations(name, 48 if name in SLOW else 300))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", GRID)
def test_the_whole_grid(name: str) -> None:
    """All are equal, refused by name, or diffusers itself has no numbers for them.

    A difference is a refusal too. It is left to UniPC along the noise at zero terminal SNR, where
    float32 resolves nothing.
    """
    found = Counter(map(outcome, whole(name)))
    print(name, dict(found))
    assert found["differ by"] <= (1 if name == "UniPCMultistepScheduler" else 0)
    assert found["equal"] >= sum(found.values()) / 3


def test_the_whole_grid_is_large() -> None:
    assert sum(len(whole(name)) for name in GRID) >= 2000


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize(
    ("name", "options", "sampler"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler"),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "euler"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "euler",
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp_2m_karras"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "dpmpp_2m"),
        ("PNDMScheduler", {}, "pndm_prk"),
        ("PNDMScheduler", {"skip_prk_steps": True}, "pndm"),
        ("DDIMScheduler", {"clip_sample": True}, "ddim"),
        ("DDIMScheduler", {}, "ddim"),
        ("EDMEulerScheduler", {}, "edm_euler"),
    ],
)
def test_the_proof_names_what_is_followed(name: str, options: dict[str, Any], sampler: str) -> None:
    config = {"_class_name": name, **SCALED, **LEADING, **options}
    proof = prove_schedule(CheckpointScheduler.of(config), 20)
    assert (proof.scheduler, proof.sampler) == (name, sampler)
    assert proof.difference <= TOLERANCE
    assert options.keys() <= proof.options.keys() | {"prediction_type"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_requested_sampler_is_proved_too(sampler: str) -> None:
    """Against its own counterpart, with the checkpoint's configuration."""
    edm = {"_class_name": "EDMEulerScheduler"}
    config = edm if "edm" in sampler else {"_class_name": "DDIMScheduler", **SCALED, **LEADING}
    proof = prove_schedule(CheckpointScheduler.of(config, sampler), 16)
    assert (proof.sampler, proof.difference <= TOLERANCE) == (sampler, True)


def test_a_dropped_option_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Karras' sigmas are lost on the way to the sampler: what the proof exists to find."""
    config = {"_class_name": "EulerDiscreteScheduler", **SCALED, "use_karras_sigmas": True}
    scheduler = CheckpointScheduler.of(config)
    plain = CheckpointScheduler.of({**config, "use_karras_sigmas": False}).schedule
    assert isinstance(plain, Schedule)
    monkeypatch.setattr(
        schedule_proof.sampling,
        "noise_plan",
        lambda name, _, steps: schedule_proof.sampling.get(name).plan(plain, steps),
    )
    with pytest.raises(CheckpointError, match="EulerDiscreteScheduler and the sampler euler diff"):
        prove_schedule(scheduler, 20)


def test_no_finite_numbers_is_a_refusal() -> None:
    """UniPC of type bh1 divides by zero where it ends on the clean latent, also in diffusers."""
    config = {"_class_name": "UniPCMultistepScheduler", **SCALED, "solver_type": "bh1"}
    with pytest.raises(CheckpointError, match="UniPCMultistepScheduler gives no finite numbers"):
        prove_schedule(CheckpointScheduler.of(config), 20)
