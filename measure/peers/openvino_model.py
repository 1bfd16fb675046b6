"""A checkpoint as optimum-intel converts it, for its own pipeline and OpenVINO GenAI's."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import older_layout
from serving import file_bytes

__all__ = ["convert", "model_bytes", "properties"]


def convert(checkpoint: Path, target: Path) -> None:
    """``optimum-cli export openvino --weight-format fp32``, tokenizers included.

    The format is named since larger models get 8-bit weights otherwise.
    """
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    with tempfile.TemporaryDirectory(dir=target.parent) as readable:
        older_layout.link(checkpoint, Path(readable))
        main_export(
            readable,
            target,
            task="text-to-image",
            library_name="diffusers",
            ov_config=OVConfig(dtype="fp32"),
            convert_tokenizer=True,
        )


def properties(threads: int) -> Mapping[str, Any]:
    """What OpenVINO is told: float32 throughout, one request at a time, on so many threads."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }


def model_bytes(directory: Path) -> int:
    """What the models take that pictures from text need."""
    names = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    return sum(file_bytes(directory / name, "*.xml", "*.bin") for name in names)
