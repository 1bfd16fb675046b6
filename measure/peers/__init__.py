"""Other software that engines are compared with, each served by its own program.

A peer may need its own environment, since its libraries conflict with others: its program then runs
under that environment's interpreter and without latentforge. ``benchmarks/peers.py`` creates the
environments. Help texts show this table, so that it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.isolation import program_command
from latentforge.runtime.text import near_miss

if TYPE_CHECKING:
    from latentforge.measure.bench.protocol import Participant

__all__ = ["PEERS", "Peer", "find_peer", "participant"]

_PROGRAMS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Other software that generates the same images from a checkpoint.

    Attributes:
        summary: one line for help texts.
        program: a file of this directory, or a module of latentforge, and its arguments.
        requirements: of pip install.
    """

    summary: str
    program: tuple[str, ...]
    requirements: tuple[str, ...]

    @property
    def is_foreign(self) -> bool:
        """True if it runs without latentforge, in an environment without it."""
        return self.program[0].endswith(".py")

    @property
    def install(self) -> str:
        """Command that installs its requirements."""
        requirements = " ".join(f"'{requirement}'" for requirement in self.requirements)
        return f"pip install {requirements}"


def _script(name: str) -> tuple[str, ...]:
    return (str(_PROGRAMS / name),)


_EAGER = ("latentforge.export.reference.eager",)

PEERS: Mapping[str, Peer] = {
    "eager": Peer(
        summary="diffusers on torch in eager mode",
        program=_EAGER,
        requirements=("latentforge[export]",),
    ),
    "compile": Peer(
        summary="diffusers with torch.compile",
        program=(*_EAGER, "compile"),
        requirements=("latentforge[export]",),
    ),
    "optimum-ort": Peer(
        summary="optimum-onnx: its export and its pipeline on ONNX Runtime",
        program=_script("serve_optimum_ort.py"),
        requirements=("optimum-onnx[onnxruntime]", "diffusers"),
    ),
    "optimum-openvino": Peer(
        summary="optimum-intel: its export and its pipeline on OpenVINO",
        program=_script("serve_optimum_openvino.py"),
        requirements=("optimum-intel[openvino]", "diffusers"),
    ),
    "openvino-genai": Peer(
        summary="OpenVINO GenAI: its C++ pipeline on optimum-intel's export",
        program=_script("serve_openvino_genai.py"),
        requirements=("openvino-genai", "optimum-intel[openvino]", "diffusers"),
    ),
    "sd-cpp": Peer(
        summary="stable-diffusion.cpp, through its Python package",
        program=_script("serve_sd_cpp.py"),
        requirements=("stable-diffusion-cpp-python", "numpy"),
    ),
}
"""The peers by name."""


def find_peer(name: str) -> Peer:
    """Return a peer by name.

    Raises:
        SettingsError: there is no such peer.
    """
    if name not in PEERS:
        raise SettingsError(f"no peer {name!r}: {near_miss(name, PEERS)}")
    return PEERS[name]


def participant(
    name: str,
    checkpoint: Path,
    *,
    scheduler: Mapping[str, Any] | None = None,
    python: str | None = None,
) -> Participant:
    """Return a peer as a benchmark participant.

    Args:
        name: a key of PEERS.
        checkpoint: a directory in diffusers' layout.
        scheduler: the diffusers scheduler of the request's sampler, see BenchJob; peers without
            latentforge need it.
        python: the interpreter of the peer's environment, if it is not this one.

    Raises:
        SettingsError: there is no such peer.
    """
    from latentforge.measure.bench.protocol import Participant

    peer = find_peer(name)
    return Participant(
        name=name,
        command=program_command(*peer.program, python=python or ""),
        model=str(checkpoint.resolve()),
        scheduler=scheduler or {},
        install=peer.install,
    )
