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
    from latentforge.measure.bench.placement import Placement
    from latentforge.measure.bench.protocol import Participant

__all__ = ["PEERS", "Peer", "find_peer", "participant", "peer_name"]

_PROGRAMS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Other software that generates the same images from a checkpoint.

    Attributes:
        summary: one line for help texts.
        program: a file of this directory, or a module of latentforge, and its arguments.
        requirements: of pip install.
        placeable: True if it takes a device and a precision; others run on the CPU.
    """

    summary: str
    program: tuple[str, ...]
    requirements: tuple[str, ...]
    placeable: bool = False

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
        placeable=True,
    ),
    "compile": Peer(
        summary="diffusers with torch.compile",
        program=(*_EAGER, "compile"),
        requirements=("latentforge[export]",),
        placeable=True,
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


def peer_name(text: str) -> str:
    """Return the key of PEERS in ``PEER`` or ``PEER@DEVICE:PRECISION``."""
    return text.partition("@")[0]


def find_peer(text: str) -> Peer:
    """Return a peer by name, whatever device and precision follow it.

    Raises:
        SettingsError: there is no such peer, or it takes no device.
    """
    name = peer_name(text)
    if name not in PEERS:
        raise SettingsError(f"no peer {name!r}: {near_miss(name, PEERS)}")
    peer = PEERS[name]
    if "@" in text and not peer.placeable:
        able = ", ".join(name for name, peer in PEERS.items() if peer.placeable)
        raise SettingsError(f"{text}: {name} takes no device and precision; {able} do")
    return peer


def participant(
    name: str,
    checkpoint: Path,
    *,
    scheduler: Mapping[str, Any] | None = None,
    python: str | None = None,
    default: Placement | None = None,
) -> Participant:
    """Return a peer as a benchmark participant.

    Args:
        name: a key of PEERS, or ``PEER@DEVICE:PRECISION`` for one in torch.
        checkpoint: a directory in diffusers' layout.
        scheduler: the diffusers scheduler of the request's sampler, see BenchJob; peers without
            latentforge need it.
        python: the interpreter of the peer's environment, if it is not this one.
        default: device and precision where the name gives none, for peers that take them; the CPU
            in fp32 unless given.

    Raises:
        SettingsError: there is no such peer, device or precision.
    """
    from latentforge.measure.bench.placement import Placement
    from latentforge.measure.bench.protocol import Participant

    peer, (_, at, placed) = find_peer(name), name.partition("@")
    own = (peer.placeable and default) or Placement()
    return Participant(
        name=name,
        command=program_command(*peer.program, python=python or ""),
        model=str(checkpoint.resolve()),
        scheduler=scheduler or {},
        install=peer.install,
        placement=own.parsed(placed) if at else own,
    )
