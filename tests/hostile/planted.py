"""Modules planted under names that latentforge and its libraries import."""

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["NAMES", "environment", "plant", "plant_everywhere", "traces"]

NAMES = (
    *("json", "typing", "importlib", "signal", "enum", "argparse", "logging", "subprocess"),
    *("multiprocessing", "runpy", "contextlib", "tempfile", "secrets", "ctypes", "encodings"),
    *("sitecustomize", "usercustomize", "__future__", "numpy", "msgspec", "tokenizers", "PIL"),
    *("tqdm", "onnxruntime", "openvino", "openvino_telemetry", "torch", "onnx", "onnx_ir"),
    *("diffusers", "transformers", "safetensors", "cuda", "tensorrt", "tensorrt_rtx", "jinja2"),
    *("latentforge", "latentforge_demo", "serving", "older_layout"),
)

PICKLES = (
    *("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "model.pt", "model.pkl"),
    *("scheduler.pkl", "manifest.pkl", "cache.npy"),
)
"""Files that libraries read as pickles, if they are let to."""

_BODY = """
import os
with open({trace!r}, "a") as file:
    print({name!r}, file=file)
"""


def plant(folder: Path, trace: Path, names: tuple[str, ...] = NAMES) -> None:
    """Write modules, half of them packages, whose import adds their name to the file `trace`."""
    for index, name in enumerate(names):
        path = folder / (f"{name}.py" if index % 2 else f"{name}/__init__.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(_BODY.format(trace=str(trace), name=name))


def plant_everywhere(folder: Path, trace: Path) -> None:
    """Plant modules, start-up files of Python and pickles in a folder and in its own folders."""
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        plant(place, trace, tuple(name for name in NAMES if not (place / name).exists()))
        opened = f"file = open({str(trace)!r}, 'a')"
        line = f"{opened}; file.write('{place.name}\\n'); file.close()"
        (place / "start.pth").write_text(f"import os; {line}\n")
        for name in ("conftest.py", "pipeline.py", "modeling.py", "handler.py"):
            (place / name).write_text(line)
        for name in PICKLES:
            (place / name).write_bytes(pickle.dumps(_Trace(line)))


class _Trace:
    """Object whose pickle runs a line of Python when it is read."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (self.line,)


def traces(trace: Path) -> list[str]:
    """Return the names of the planted modules that were imported."""
    return trace.read_text().split() if trace.exists() else []


def environment(**variables: str) -> Mapping[str, str]:
    """Return this process's environment without Python's variables, and with those given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "PATH": path, **variables}
