"""Protocol between a benchmark and its participants.

A participant is a program whose last argument is the path of a BenchJob in JSON. It writes one JSON
object per line to standard output, and nothing else:

    {"missing": "reason"}                  a library is not installed; the program ends
    {"prepared": seconds}                  it has just converted the checkpoint to its own files
    {"ready": {"versions": {}, "precision": "fp32", "bytes": N}}
                                           the model is loaded; N is the size of its files
    {"total": seconds, "stages": {"denoiser": [seconds of each call]}}
                                           one request is done; sent once per line of standard input
    {"error": "reason"}                    in place of any of these; the program ends

Stages that a participant cannot time are left out. Before it answers a request, it saves the images
to the file that the job names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from latentforge.measure.bench.placement import Placement
from latentforge.measure.equivalence import same_trajectory
from latentforge.measure.results import Role
from latentforge.runtime.isolation import program_command
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.record import Record
from latentforge.runtime.settings import Settings

__all__ = ["BenchJob", "Participant"]

_WORKER = program_command("latentforge.measure.bench.worker")


class BenchJob(Record, frozen=True, kw_only=True):
    """Work of one participant.

    Attributes:
        model: an engine directory, or a checkpoint in diffusers' layout.
        settings: the request.
        threads: the number that the participant may use.
        picture: the .npy file for the images of the last request, (n, 3, height, width) in -1..1.
        noise: a .npy file with the initial noise, (n, channels, h, w) of unit variance: what torch
            draws from the seed.
        folder: the participant's own folder, kept between its starts.
        scheduler: the diffusers scheduler that the sampler corresponds to: its class (``name``),
            arguments for its from_config (``options``) and, for samplers that need them,
            ``timesteps``.
        device: ``cpu`` or ``cuda``, and precision: ``fp32``, ``fp16`` or ``bf16``; for
            participants in torch.
    """

    model: str
    settings: Settings
    threads: int
    picture: str
    noise: str = ""
    folder: str = ""
    scheduler: Mapping[str, Any] = {}
    device: str = "cpu"
    precision: str = "fp32"

    @classmethod
    def read(cls, path: str) -> "BenchJob":
        """Read a job file."""
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        """Write the job file of a participant's process."""
        path.write_bytes(msgspec.json.encode(self))


@dataclass(frozen=True, kw_only=True)
class Participant:
    """Program that serves a model under a name.

    Attributes:
        command: the program and its arguments, up to the job file.
        model: an engine directory, or a checkpoint in diffusers' layout.
        scheduler: see BenchJob.
        same_trajectory: True if it is meant to generate the reference's image. Otherwise it is
            class B, however close its image comes.
        gate: the quality gate that its images have passed, if it is class B.
        overrides: settings that replace the request's and lead to a different image.
        install: how to install what it needs.
        placement: device that it runs on, and the precision that one in torch is asked for.
    """

    name: str
    command: tuple[str, ...]
    model: str
    role: Role = "peer"
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    same_trajectory: bool = True
    gate: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    install: str = ""
    placement: Placement = field(default_factory=Placement)

    @property
    def is_engines(self) -> bool:
        """True if the model is an engine directory."""
        return self.command == _WORKER

    @classmethod
    def of(cls, engines: Path, name: str = "", *, unaccelerated: bool = False) -> "Participant":
        """Return an engine directory as a participant.

        Args:
            engines: the directory.
            name: of the participant; by default the directory's.
            unaccelerated: ignore the manifest's acceleration plan, which is otherwise followed.
        """
        manifest = Manifest.read(engines, hashes=False)
        plan = manifest.acceleration
        overrides = {} if plan is None or unaccelerated else plan.request
        return cls(
            name=name or engines.resolve().name,
            command=_WORKER,
            model=str(engines),
            role="engines",
            same_trajectory=same_trajectory(manifest) and not overrides,
            gate=_gate(manifest, accelerated=bool(overrides)),
            overrides=overrides,
            placement=Placement.of(manifest),
        )


def _gate(manifest: Manifest, *, accelerated: bool) -> str:
    """Return the image quality that the last stage, or the plan, was measured to have."""
    figures = manifest.quality.get("image", {})
    if accelerated and manifest.acceleration is not None:
        figures = manifest.acceleration.measured
    shown = (f"{name} {value:.4g}" for name, value in figures.items())
    return f"passed its gate: {', '.join(shown)}" if figures else ""
