"""Networks of the demo checkpoint, and their export to a diffusers directory.

A small Stable Diffusion: a CLIP text encoder with its own byte-pair tokenizer, a UNet with
cross-attention to the text, and an autoencoder with 4 latent channels. As in DeciDiffusion 1.0, the
largest resolution has no attention and the schedule ends in pure noise (v-prediction, zero terminal
SNR, trailing timesteps), so the first step already depends on the prompt.
"""

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentforge.export.demo.data import SIZE
from latentforge.train.distill.training_noise import TrainingNoise

__all__ = ["TOKENS", "Denoiser", "autoencoder", "export", "scheduler", "tokenizer"]
__all__ += ["training_noise"]

TOKENS = 24
"""Length of a prompt in tokens, with start and end."""

_WIDTH = 160
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
_TOKENIZER = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **_SPECIAL}


def autoencoder() -> AutoencoderKL:
    """Return an autoencoder of (3, 64, 64) images in -1..1 and (4, 16, 16) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def scheduler() -> DDIMScheduler:
    """Return the noise schedule of training and sampling."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def training_noise() -> TrainingNoise:
    """Return the noise that the denoiser is trained with."""
    own = scheduler()
    return TrainingNoise.of({**own.config, "_class_name": type(own).__name__})


def _text_encoder(vocabulary: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=_WIDTH,
            intermediate_size=3 * _WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=_WIDTH,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.eos_token_id,
        )
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        cross_attention_dim=_WIDTH,
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,  # diffusers takes this as the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


class Denoiser(nn.Module):
    """UNet and text encoder, which are trained together."""

    def __init__(self, vocabulary: CLIPTokenizer) -> None:
        """Initialize both with random weights, for the token ids of ``vocabulary``."""
        super().__init__()
        self.text_encoder = _text_encoder(vocabulary)
        self.unet = _unet()

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Predict v (batch, 4, 16, 16) at a timestep (batch,) for ``tokens`` (batch, TOKENS)."""
        states = self.text_encoder(tokens)[0]
        prediction: Tensor = self.unet(sample, timestep, states).sample
        return prediction


def _pieces(texts: Iterable[str]) -> list[str]:
    """Train a byte-pair encoding that merges every word of ``texts``, and return its merges."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=0,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def tokenizer(directory: Path, texts: Iterable[str]) -> CLIPTokenizer:
    """Return the tokenizer in ``directory``, after training it on ``texts`` if there is none.

    The files and the order of the vocabulary are CLIP's: bytes, bytes at the end of a word, merges,
    start and end.
    """
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    if not merges.exists():
        directory.mkdir(parents=True)
        learned = _pieces(texts)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        joined = [merge.replace(" ", "") for merge in learned]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *joined, _START, _END]
        numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        vocabulary.write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
        merges.write_text("\n".join(["#version: 0.2", *learned, ""]), encoding="utf-8")
        _write_json(directory / "tokenizer_config.json", _TOKENIZER)
        _write_json(directory / "special_tokens_map.json", _SPECIAL)
    return CLIPTokenizer.from_pretrained(directory)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(directory: Path, vae: AutoencoderKL, denoiser: Denoiser, vocabulary: Path) -> None:
    """Write a ``StableDiffusionPipeline`` directory with float16 safetensors.

    Args:
        directory: the directory to write.
        vae: the autoencoder.
        denoiser: UNet and text encoder.
        vocabulary: directory of the tokenizer. Its files are copied, since transformers would save
            a single tokenizer.json, which older checkpoints do not have.
    """
    parts: dict[str, Any] = {"vae": vae, "unet": denoiser.unet}
    parts["text_encoder"] = denoiser.text_encoder
    halves = {name: copy.deepcopy(part).eval().to(torch.float16) for name, part in parts.items()}
    pipeline = StableDiffusionPipeline(
        **halves,
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    shutil.rmtree(directory / "tokenizer")
    shutil.copytree(vocabulary, directory / "tokenizer")
