"""Modules planted under names that latentforge and its libraries import."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["NAMES", "environment", "plant", "traces"]

NAMES = (
    *("json", "typing", "importlib", "signal", "enum", "argparse", "logging", "subprocess"),
    *("multiprocessing", "runpy", "contextlib", "tempfile", "secrets", "ctypes", "encodings"),
    *("sitecustomize", "usercustomize", "__future__", "numpy", "msgspec", "tokenizers", "PIL"),
    *("tqdm", "onnxruntime", "openvino", "openvino_telemetry", "torch", "onnx", "onnx_ir"),
    *("diffusers", "transformers", "safetensors", "cuda", "tensorrt", "tensorrt_rtx", "jinja2"),
    *("latentforge", "latentforge_demo", "serving", "older_layout"),
)

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


def traces(trace: Path) -> list[str]:
    """Return the names of the planted modules that were imported."""
    return trace.read_text().split() if trace.exists() else []


def environment(**variables: str) -> Mapping[str, str]:
    """Return this process's environment without Python's variables, and with those given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "PATH": path, **variables}
