"""optimum-intel's conversion of a checkpoint, for its own pipeline and OpenVINO GenAI's."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import older_layout
from serving import file_bytes

__all__ = ["convert", "model_bytes", "properties"]


def convert(checkpoint: Path, target: Path) -> None:
    """Run ``optimum-cli export openvino --weight-format fp32``, tokenizers included.

    The format is explicit because larger models get 8-bit weights by default.
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
    """Return OpenVINO's properties for float32 and one request at a time on ``threads`` threads."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }


def model_bytes(directory: Path) -> int:
    """Return the size of the models that text-to-image generation loads."""
    names = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    return sum(file_bytes(directory / name, "*.xml", "*.bin") for name in names)
