"""Write full-size checkpoints with random weights, for measuring where no hub is at hand.

    python benchmarks/checkpoints.py sd15 /tmp/sd15

The architecture is the published one to the last number, so times, memory and file sizes are
real; the pictures are noise. The tokenizer is the embedded demo checkpoint's.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from latentforge.export.demo import CHECKPOINT as DEMO

__all__ = ["ARCHITECTURES", "main", "write_sd15"]


def write_sd15(target: Path, seed: int = 0) -> None:
    """Stable Diffusion 1.5: 859,520,964 parameters in the UNet, 4.3 GB in all, in float32."""
    torch.manual_seed(seed)
    _unet().save_pretrained(target / "unet")
    _vae().save_pretrained(target / "vae")
    _text_encoder().save_pretrained(target / "text_encoder")
    _scheduler().save_pretrained(target / "scheduler")
    _write_tokenizer(target / "tokenizer", max_length=77)
    classes = {
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionPipeline", **classes}
    (target / "model_index.json").write_text(json.dumps(index, indent=2))


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _text_encoder() -> CLIPTextModel:
    """CLIP ViT-L/14's text tower; the start and end tokens are the demo tokenizer's."""
    demo = json.loads((DEMO / "text_encoder" / "config.json").read_text())
    tokens = {key: demo[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            projection_dim=768,
            **tokens,
        )
    )


def _scheduler() -> PNDMScheduler:
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )


def _write_tokenizer(target: Path, max_length: int) -> None:
    shutil.copytree(DEMO / "tokenizer", target, dirs_exist_ok=True)
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_max_length": max_length}, indent=2))


ARCHITECTURES: Mapping[str, Callable[[Path, int], None]] = {"sd15": write_sd15}


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ARCHITECTURES[options.architecture](options.target, options.seed)


if __name__ == "__main__":
    main()
