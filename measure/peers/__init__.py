"""Who our engines are measured against, and the program that serves each as a participant.

A peer may live in an environment of its own, since they want libraries that don't go together: its
program needs that environment's interpreter and nothing of latentforge. ``benchmarks/peers.py``
makes the environments. The table is for every command's help, so what else there is comes on use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.runtime.errors import SettingsError

if TYPE_CHECKING:
    from latentforge.measure.bench.protocol import Participant

__all__ = ["PEERS", "Peer", "participant"]

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Somebody else's way to make the same pictures.

    Attributes:
        summary: what it is, in a line.
        program: what its interpreter runs: a file beside this one, or ``-m`` and a module of ours.
        requirements: what pip installs for it.
    """

    summary: str
    program: tuple[str, ...]
    requirements: tuple[str, ...]

    @property
    def is_foreign(self) -> bool:
        """Whether it can live without latentforge, in an environment of its own."""
        return self.program[0] != "-m"

    @property
    def install(self) -> str:
        """What to do where it is missing."""
        needed = " ".join(f"'{requirement}'" for requirement in self.requirements)
        return f"pip install {needed}"


def _script(name: str) -> tuple[str, ...]:
    return (str(_HERE / name),)


_EAGER = ("-m", "latentforge.export.reference.eager")

PEERS: Mapping[str, Peer] = {
    "eager": Peer(
        summary="diffusers on torch, as it is",
        program=_EAGER,
        requirements=("latentforge[export]",),
    ),
    "compile": Peer(
        summary="diffusers with torch.compile",
        program=(*_EAGER, "compile"),
        requirements=("latentforge[export]",),
    ),
    "optimum-ort": Peer(
        summary="optimum-onnx's export and pipeline on ONNX Runtime",
        program=_script("serve_optimum_ort.py"),
        requirements=("optimum-onnx[onnxruntime]", "diffusers"),
    ),
    "optimum-openvino": Peer(
        summary="optimum-intel's export and pipeline on OpenVINO",
        program=_script("serve_optimum_openvino.py"),
        requirements=("optimum-intel[openvino]", "diffusers"),
    ),
    "openvino-genai": Peer(
        summary="OpenVINO GenAI's C++ pipeline on optimum-intel's export",
        program=_script("serve_openvino_genai.py"),
        requirements=("openvino-genai", "optimum-intel[openvino]", "diffusers"),
    ),
    "sd-cpp": Peer(
        summary="stable-diffusion.cpp, by its Python package",
        program=_script("serve_sd_cpp.py"),
        requirements=("stable-diffusion-cpp-python", "numpy"),
    ),
}
"""The peers by name."""


def participant(
    name: str,
    checkpoint: Path,
    *,
    sampler: str,
    steps: int | None = None,
    python: str | None = None,
) -> Participant:
    """A peer as a participant on a checkpoint.

    Args:
        name: of PEERS.
        checkpoint: a directory in diffusers' layout.
        sampler: the request's; what it follows in diffusers is what the peer is told.
        steps: the request's, which samplers with timesteps of their own need.
        python: the interpreter of its environment, if not this one.

    Raises:
        SettingsError: no such peer, or a sampler that needs the number of steps.
        CheckpointError: the checkpoint's scheduler is missing, or of a kind we don't know.
    """
    if name not in PEERS:
        raise SettingsError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    from latentforge.measure.bench.protocol import Participant

    peer = PEERS[name]
    return Participant(
        name=name,
        command=(python or sys.executable, *peer.program),
        model=str(checkpoint.resolve()),
        scheduler=_scheduler(checkpoint, sampler, steps) if peer.is_foreign else {},
        install=peer.install,
    )


def _scheduler(checkpoint: Path, sampler: str, steps: int | None) -> Mapping[str, Any]:
    """The diffusers class that a sampler follows, its options, and its timesteps if it has some.

    Some files are corrected by the pipeline that reads them, but not where a scheduler is made of
    another's configuration, as peers do.
    """
    from latentforge.export.checkpoint import read_json  # noqa: TID251
    from latentforge.export.schedulers import SCHEDULERS, corrected, schedule_of  # noqa: TID251

    row = SCHEDULERS[sampler]
    config = read_json(checkpoint / "scheduler" / "scheduler_config.json")
    if "XL" not in read_json(checkpoint / "model_index.json").get("_class_name", ""):
        config = corrected(config)
    settled = {key: config[key] for key in ("steps_offset", "clip_sample") if key in config}
    told: dict[str, Any] = {"name": row.scheduler, "options": {**settled, **row.options}}
    if row.timesteps:
        if steps is None:
            raise SettingsError(f"{sampler} has timesteps of its own: say how many steps")
        told["timesteps"] = row.timesteps(schedule_of(config), steps)
    return told
