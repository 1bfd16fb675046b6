"""Servers of other software: their environments, converted models, commands and requests."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
from PIL import Image

from latentforge.benchmark import diffusers_scheduler
from latentforge.measure.peers import PEERS
from latentforge.runtime.isolation import child_environment, program_command
from serving_stages.client import Answer

__all__ = ["OURS", "SERVERS", "ImageOrder", "PeerFolders", "ServerKind", "prepared"]

_APPS = Path(__file__).parent.parent / "serving_apps"
_PROGRAMS = Path(next(peer.program[0] for peer in PEERS.values() if peer.is_foreign)).parent


@dataclass(frozen=True, kw_only=True)
class ImageOrder:
    """Image that every server is asked for; the sampler is DDIM, or its equal, everywhere."""

    steps: int
    guidance: float
    width: int
    height: int

    def plain(self, number: int) -> dict[str, Any]:
        """Return the fields of serving_apps/."""
        return {
            **self._common(number),
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "width": self.width,
            "height": self.height,
        }

    def ours(self, number: int) -> dict[str, Any]:
        """Return the fields of latentforge's server."""
        return {
            **self._common(number),
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "guidance_rescale": 0.0,
            "size": f"{self.width}x{self.height}",
            "sampler": "ddim",
            "unaccelerated": True,
        }

    def web_ui(self, number: int) -> dict[str, Any]:
        """Return the fields of stable-diffusion.cpp's server; DDIM without noise is Euler."""
        return {
            **self._common(number),
            "steps": self.steps,
            "cfg_scale": self.guidance,
            "width": self.width,
            "height": self.height,
            "sampler_name": "euler",
        }

    def check(self, picture: bytes) -> None:
        """Raise RuntimeError for a picture of another size."""
        size = Image.open(io.BytesIO(picture)).size
        if size != (self.width, self.height):
            raise RuntimeError(f"an image of {size[0]}x{size[1]} pixels came")

    @staticmethod
    def _common(number: int) -> dict[str, Any]:
        return {"prompt": f"{number} red apples", "seed": number}


@dataclass(frozen=True, kw_only=True)
class ServerKind:
    """Kind of server.

    Attributes:
        text: for the table.
        path: that requests are sent to.
        ready: path that is answered once it makes images.
        fields: of a request of a number.
        picture: the file in an answer.
        peer: key of PEERS, whose environment and conversion it has; empty for latentforge.
        app: program of serving_apps/; empty for a server of its own.
        arguments: of the program.
    """

    text: str
    path: str = "/generate"
    ready: str = "/health"
    fields: Callable[[ImageOrder, int], dict[str, Any]] = ImageOrder.plain
    picture: Callable[[Answer], bytes] = lambda answer: answer.body
    peer: str = ""
    app: str = ""
    arguments: tuple[str, ...] = ()


def _of_openai(answer: Answer) -> bytes:
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def _of_web_ui(answer: Answer) -> bytes:
    return base64.b64decode(answer.json()["images"][0])


OURS = ServerKind(
    text="latentforge serve",
    path="/v1/images/generations",
    ready="/readyz",
    fields=ImageOrder.ours,
    picture=_of_openai,
)

_SD_SERVER = ServerKind(
    text="sd-server of stable-diffusion.cpp",
    path="/sdapi/v1/txt2img",
    ready="/sdapi/v1/samplers",
    fields=ImageOrder.web_ui,
    picture=_of_web_ui,
    peer="sd-cpp",
)

SERVERS: Mapping[str, ServerKind] = {
    "sd-cpp": ServerKind(
        text="FastAPI and stable-diffusion.cpp's Python package", peer="sd-cpp", app="sd_cpp.py"
    ),
    "optimum-ort": ServerKind(
        text="FastAPI and optimum-onnx", peer="optimum-ort", app="optimum_ort.py"
    ),
    "optimum-openvino": ServerKind(
        text="FastAPI and optimum-intel", peer="optimum-openvino", app="optimum_openvino.py"
    ),
    "openvino-genai": ServerKind(
        text="FastAPI and OpenVINO GenAI", peer="openvino-genai", app="genai.py"
    ),
    "openvino-genai-f32": ServerKind(
        text="FastAPI and OpenVINO GenAI in float32",
        peer="openvino-genai",
        app="genai.py",
        arguments=("--f32",),
    ),
}
"""Servers that ours is compared with, by name; each in its default configuration, f32 aside."""


@dataclass(frozen=True, kw_only=True)
class PeerFolders:
    """Folders of peers' environments and converted models, and the model.

    Attributes:
        environments: folder of the environments, see peers.py.
        models: folder of converted models.
        checkpoint: in diffusers' layout.
    """

    environments: Path
    models: Path
    checkpoint: Path

    @property
    def model(self) -> Path:
        """Folder of what this checkpoint, with these files, is converted to."""
        files = sorted(path for path in self.checkpoint.resolve().rglob("*") if path.is_file())
        parts = [f"{path} {path.stat().st_mtime_ns}" for path in files]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return self.models / f"{self.checkpoint.name}-{digest[:12]}"


def prepared(name: str, place: PeerFolders) -> tuple[ServerKind, Callable[[int], Sequence[str]]]:
    """Install a peer and convert the model for it, once each.

    Returns:
        Its kind, and a function that returns its command for a port.

    Raises:
        RuntimeError: the model cannot be converted.
    """
    kind = SERVERS[name]
    python = peers.environment(peers.ENVIRONMENTS[kind.peer], place.environments)
    model = _converted(kind.peer, python, place)
    server = next(python.parents[1].rglob("sd-server"), None)
    if kind.peer == "sd-cpp" and server is not None:
        return _SD_SERVER, _sd_server(server, model)
    app = (str(python), str(_APPS / kind.app), str(model))
    return kind, lambda port: (*app, str(port), *kind.arguments)


def _sd_server(server: Path, model: Path) -> Callable[[int], Sequence[str]]:
    """Return a function that returns the command of stable-diffusion.cpp's own server.

    pip installs it beside the Python package, and without the place of the library of both.
    """
    packages = server.parents[1]
    libraries = packages / "stable_diffusion_cpp" / "lib"
    command = ("env", f"LD_LIBRARY_PATH={libraries}", str(server), "--model", str(model))
    return lambda port: (*command, "--listen-port", str(port))


def _converted(peer: str, python: Path, place: PeerFolders) -> Path:
    """Return the directory of the converted model, as the peer's program makes it for bench."""
    target = place.model / ("openvino" if "openvino" in peer else peer)
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that failed
        partial.mkdir(parents=True)
        arguments = ("--convert", str(place.checkpoint), str(partial))
        command = program_command(PEERS[peer].program[0], *arguments, python=str(python))
        _run(command, target.with_suffix(".log"))
        partial.rename(target)
    return _genai_view(target, place) if peer == "openvino-genai" else target


def _run(command: Sequence[str], log: Path) -> None:
    """Run a conversion, whose messages are JSON; exporters' remarks go to the log."""
    with log.open("w") as remarks:
        ended = subprocess.run(
            command, env=child_environment(), stdout=subprocess.PIPE, stderr=remarks, text=True
        )
    if ended.returncode:
        reasons = [next(iter(json.loads(line).values())) for line in ended.stdout.splitlines()]
        raise RuntimeError(" ".join(reasons) or f"exited with status {ended.returncode}: see {log}")


def _genai_view(model: Path, place: PeerFolders) -> Path:
    """Return a directory of links with a scheduler that OpenVINO GenAI reads, as bench makes it."""
    view = model.with_name("openvino-genai")
    if not view.exists():
        sys.path.append(str(_PROGRAMS))  # its programs import each other as neighbours
        view.mkdir()
        program = importlib.import_module("serve_openvino_genai")
        program.link(model, view, diffusers_scheduler(place.checkpoint, "ddim", 1))
    return view
