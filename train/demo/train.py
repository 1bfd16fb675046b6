"""Training of the demo checkpoint on a CPU, in three stages that can be stopped and resumed.

``autoencoder`` trains the VAE on the images, ``denoiser`` trains UNet and text encoder on latents
and captions, and ``decoder`` fine-tunes the VAE's decoder on generated latents. The state directory
holds one state file per stage (weights, their average, optimizer, step, random state) and
``checkpoint/``, the diffusers directory.
"""

import argparse
import copy
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from latentforge.export.demo import COLORS, GUIDANCE, NAMES
from latentforge.export.demo.data import caption, captions, pictures
from latentforge.train.demo import architecture
from latentforge.train.demo.optimizer import Muon, groups
from latentforge.train.distill.batch import Comparison
from latentforge.train.distill.clean_latents import (
    CleanLatents,
    NoisySource,
    Positions,
    ShuffledEpochs,
)
from latentforge.train.distill.task import task_loss

__all__ = ["STAGES", "TrainingRun", "TrainSettings", "main", "train"]

STAGES = {"autoencoder": 0.2, "denoiser": 0.65, "decoder": 0.15}
"""Stages in order, with their shares of the time of a complete run."""

_COLORS = list(COLORS)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Options of the command line.

    Attributes:
        package: unpacked npm package with the images.
        state: state directory.
        stage: the stage to run; all of them if None.
        minutes: time of the run.
        batch: latents per step of the denoiser.
        rate: peak learning rate.
        cooldown: share of the time at the end over which the learning rate falls to zero.
        start: diffusers directory with the initial autoencoder.
        threads: number of CPU threads.
    """

    package: Path
    state: Path
    stage: str | None = None
    minutes: float = 120.0
    batch: int = 48
    rate: float = 5e-3
    cooldown: float = 0.3
    start: Path | None = None
    threads: int = 2


class TrainingRun:
    """Model in training, with the average of its weights, its optimizer and its state file."""

    def __init__(self, model: nn.Module, rate: float, file: Path) -> None:
        """Prepare the training of ``model``, resuming from ``file`` if it exists."""
        self.model, self.file, self.step = model, file, 0
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = Muon(groups(model, rate, 1e-3, 3e-3))
        if file.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        rates = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # The command line's rate replaces that of the stopped run.
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["peak"] = rate
        self.step = state["step"]
        torch.set_rng_state(state["random"])

    def save(self) -> None:
        """Write the state file atomically, so that a crash leaves the old one intact."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "random": torch.get_rng_state(),
        }
        partial = self.file.with_suffix(".new")
        torch.save(state, partial)
        os.replace(partial, self.file)

    def advance(self, loss: Tensor, factor: float) -> float:
        """Take one optimizer step, with learning rates of ``factor`` times their peaks."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.schedule(factor)
        self.optimizer.step()
        self.step += 1
        keep = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, weight in zip(
                self.average.parameters(), self.model.parameters(), strict=True
            ):
                average.lerp_(weight, 1 - keep)
        return loss.item()


def train(
    run: TrainingRun,
    objective: Callable[[float], Tensor],
    minutes: float,
    cooldown: float,
    title: str,
) -> bool:
    """Minimize an objective for a fixed time.

    The learning rate rises over 100 steps and falls to zero in the last ``cooldown`` of the time.

    Args:
        run: the model in training.
        objective: returns the loss of a random batch, for the elapsed share of the time.
        minutes: duration.
        cooldown: share of the time.
        title: shown with the progress.

    Returns:
        False if interrupted.
    """
    started, saved, mean, total = time.monotonic(), 0.0, 0.0, minutes * 60
    bar = tqdm(total=round(total), unit="s", desc=title, disable=not sys.stderr.isatty())
    first = run.step
    try:
        while (elapsed := time.monotonic() - started) < total:
            factor = min(1.0, (run.step - first + 1) / 100, (1 - elapsed / total) / cooldown)
            loss = run.advance(objective(elapsed / total), factor)
            mean = loss if run.step == first + 1 else mean + 0.01 * (loss - mean)
            bar.set_postfix(step=run.step, loss=f"{mean:.4f}", refresh=False)
            bar.update(round(elapsed) - bar.n)
            if bar.disable and run.step % 50 == 0:
                print(f"{title}: {elapsed:.0f} s, step {run.step}, loss {mean:.4f}", flush=True)
            if elapsed - saved > 180:
                run.save()
                saved = elapsed
    except KeyboardInterrupt:
        print(f"{title}: stopped at step {run.step}; the same command resumes it.")
        return False
    finally:
        bar.close()
        run.save()
    return True


class Trainer:
    """Images and networks of the demo, with one method per training stage."""

    def __init__(self, settings: TrainSettings) -> None:
        """Read the images; create or load the tokenizer and the autoencoder."""
        self.settings = settings
        settings.state.mkdir(parents=True, exist_ok=True)
        self.generated = settings.state / "drawn.pt"
        # (names, colors, 3, SIZE, SIZE), 8-bit.
        self.pictures = torch.from_numpy(pictures(settings.package)).permute(0, 1, 4, 2, 3)
        texts = [text for name in NAMES for color in _COLORS for text in captions(name, color)]
        self.vocabulary = architecture.tokenizer(settings.state / "tokenizer", texts)
        self.vae = architecture.autoencoder()
        if settings.start is not None:
            weights = AutoencoderKL.from_pretrained(
                settings.start, subfolder="vae", use_safetensors=True
            )
            self.vae.load_state_dict({k: v.float() for k, v in weights.state_dict().items()})
            if not (settings.state / "autoencoder.pt").exists():
                self._run("autoencoder", self.vae, settings.rate).save()
        self.vae.to(memory_format=torch.channels_last)

    def _run(self, stage: str, model: nn.Module, rate: float) -> TrainingRun:
        return TrainingRun(model, rate, self.settings.state / f"{stage}.pt")

    def _random_indices(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw ``count`` random indices of names and of colors."""
        return torch.randint(len(NAMES), (count,)), torch.randint(len(_COLORS), (count,))

    def _floats(self, bytes_: Tensor) -> Tensor:
        floats = bytes_.float() / 127.5 - 1
        return floats.contiguous(memory_format=torch.channels_last)

    def autoencoder(self, minutes: float) -> bool:
        """Train the autoencoder on random quarters of the images; return False if interrupted."""
        run = self._run("autoencoder", self.vae, self.settings.rate)

        def objective(_: float) -> Tensor:
            names, colors = self._random_indices(32)
            top, left = torch.randint(0, 33, (2,)).tolist()
            crops = self.pictures[names, colors, :, top : top + 32, left : left + 32]
            real = self._floats(crops)
            latents = self.vae.encode(real).latent_dist
            loss = _difference(self.vae.decode(latents.sample()).sample, real)
            penalty: Tensor = latents.kl().mean()
            return loss + 1e-8 * penalty

        return train(run, objective, minutes, self.settings.cooldown, "autoencoder")

    def decoder(self, minutes: float) -> bool:
        """Fine-tune the decoder on mixes of encoded and generated latents of each image.

        It learns to sharpen blurred latents of the denoiser. The encoder is frozen, since the
        denoiser was trained on its latents.

        Returns:
            False if interrupted.
        """
        scale = self.vae.config["scaling_factor"]
        clean, generated = self.latents / scale, self._generated_latents() / scale
        spread = 0.1 * clean.std((0, 1, 3, 4)).reshape(1, -1, 1, 1)
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)
        run = self._run("decoder", self.vae, self.settings.rate / 2)

        def objective(_: float) -> Tensor:
            names, colors = self._random_indices(16)
            share, noise = torch.rand(2, 16, 1, 1, 1)
            latents = clean[names, colors].lerp(generated[names, colors], share)
            latents += noise * spread * torch.randn_like(latents)
            latents = latents.contiguous(memory_format=torch.channels_last)
            real = self._floats(self.pictures[names, colors])
            return _difference(self.vae.decode(latents).sample, real)

        return train(run, objective, minutes, self.settings.cooldown, "decoder")

    @torch.no_grad()
    def _generated_latents(self) -> Tensor:
        """Generate or load latents for every image: (names, colors, 4, 16, 16)."""
        if not self.generated.exists():
            denoiser = self._denoiser().eval()
            state = torch.load(self.settings.state / "denoiser.pt", weights_only=True)
            denoiser.load_state_dict(state["average"])
            empty = _encode(self.vocabulary, "")
            rows = []
            for name in tqdm(NAMES, desc="generating", disable=not sys.stderr.isatty()):
                texts = [f"{name} on a {color} background" for color in _COLORS]
                tokens = [_encode(self.vocabulary, text) for text in texts]
                rows.append(_generate(denoiser, torch.stack(tokens + [empty] * len(tokens))))
            torch.save(torch.stack(rows), self.generated)
        latents: Tensor = torch.load(self.generated, weights_only=True)
        return latents

    def denoiser(self, minutes: float) -> bool:
        """Train UNet and text encoder on v-prediction; return False if interrupted."""
        self.generated.unlink(missing_ok=True)
        run = self._run("denoiser", self._denoiser(), self.settings.rate)
        source = CaptionedLatents(self.latents, self.vocabulary)
        source.restore({"position": run.step * self.settings.batch})
        # A tenth of the captions are empty: classifier-free guidance needs that.
        noisy = NoisySource(source, architecture.training_noise(), free=0.1, times=source.times)

        def objective(progress: float) -> Tensor:
            source.progress = progress
            generator = torch.Generator().manual_seed(run.step)
            batch = noisy.draw(self.settings.batch, generator)
            feeds = dict(batch.feeds)
            feeds["sample"] = feeds["sample"].contiguous(memory_format=torch.channels_last)
            output = run.model(**feeds)
            # Errors of v have the same weight at all timesteps.
            alike = torch.ones(len(output))
            known = output.detach()
            return task_loss(Comparison(batch=batch, student=output, teacher=known, weight=alike))

        return train(run, objective, minutes, self.settings.cooldown, "denoiser")

    def _denoiser(self) -> architecture.Denoiser:
        denoiser = architecture.Denoiser(self.vocabulary)
        denoiser.unet.to(memory_format=torch.channels_last)
        return denoiser.train()

    def load(self) -> None:
        """Load the averaged weights of the autoencoder, and encode the images."""
        for stage in ("autoencoder", "decoder"):
            file = self.settings.state / f"{stage}.pt"
            if file.exists():
                self.vae.load_state_dict(torch.load(file, weights_only=True)["average"])
        self.vae.eval().requires_grad_(True)
        with torch.no_grad():
            rows = [self.vae.encode(self._floats(row)).latent_dist.mean for row in self.pictures]
        # (names, colors, 4, 16, 16), scaled as for the UNet, encoded once per stage.
        self.latents = torch.stack(rows)
        self.vae.register_to_config(scaling_factor=float(1 / self.latents.std()))
        self.latents *= self.vae.config["scaling_factor"]

    def export(self) -> None:
        """Write ``checkpoint/`` from the averaged weights of all stages."""
        self.load()
        denoiser, file = self._denoiser(), self.settings.state / "denoiser.pt"
        if file.exists():
            denoiser.load_state_dict(torch.load(file, weights_only=True)["average"])
        architecture.export(
            self.settings.state / "checkpoint",
            self.vae,
            denoiser,
            self.settings.state / "tokenizer",
        )


class CaptionedLatents:
    """Latents of all images in shuffled epochs, with the tokens of random captions.

    Attributes:
        progress: elapsed share of the training.
    """

    def __init__(self, latents: Tensor, vocabulary: CLIPTokenizer) -> None:
        """Start at the first position of ``latents`` (names, colors, 4, 16, 16)."""
        self.progress = 0.0
        self._latents, self._vocabulary, self._positions = latents, vocabulary, Positions()
        self._order = ShuffledEpochs(count=latents.shape[0] * latents.shape[1])

    def draw(self, rows: int, generator: torch.Generator) -> CleanLatents:
        """Return the next latents."""
        chosen = self._order.take(self._positions.take(rows), rows)
        chances = torch.rand(rows, generator=generator).tolist()
        texts = [_caption(*row) for row in zip(chosen.tolist(), chances, strict=True)]
        tokens = torch.stack([_encode(self._vocabulary, text) for text in texts])
        return CleanLatents(
            latents=self._latents.flatten(0, 1)[chosen],
            condition={"tokens": tokens},
            free={"tokens": _encode(self._vocabulary, "").expand(rows, -1)},
        )

    def times(self, steps: int, rows: int, generator: torch.Generator) -> Tensor:
        """Return timesteps for the present progress: see _times()."""
        return _times(rows, self.progress, generator)

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return self._positions.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._positions.restore(state)


def _caption(image: int, chance: float) -> str:
    """Pick a caption of an image by a random number in [0, 1)."""
    name, color = divmod(image, len(_COLORS))
    return caption(NAMES[name], _COLORS[color], chance)


def _generate(denoiser: architecture.Denoiser, tokens: Tensor) -> Tensor:
    """Generate latents (batch, 4, 16, 16) in 8 steps with classifier-free guidance.

    Args:
        denoiser: UNet and text encoder.
        tokens: token ids of the texts, followed by as many of the empty text.
    """
    scheduler = architecture.scheduler()
    scheduler.set_timesteps(8)
    latents = torch.randn(len(tokens) // 2, 4, 16, 16)
    for time_ in scheduler.timesteps:
        both = denoiser(torch.cat([latents, latents]), time_.expand(len(tokens)), tokens)
        text, free = both.chunk(2)
        latents = scheduler.step(free + GUIDANCE * (text - free), time_, latents).prev_sample
    return latents


def _times(count: int, progress: float, generator: torch.Generator) -> Tensor:
    """Draw stratified timesteps in [0, 1000), with extra weight on the noisier half.

    At high noise levels the prediction depends on the text alone, and outlines are learned there,
    so the extra weight is large at first. One in 16 is 999 exactly, where sampling starts.

    Args:
        count: number of timesteps.
        progress: elapsed share of the training.
        generator: of the random numbers.
    """
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    spread = parts / count
    share = 0.5 - 0.4 * progress
    moved = 500 + 500 * spread / share
    even = 1000 * (spread - share) / (1 - share)
    times = torch.where(spread < share, moved, even).long().clamp(0, 999)
    times[spread < 1 / 16] = 999
    return times


def _difference(decoded: Tensor, real: Tensor) -> Tensor:
    """Return the loss between images: of values, and of edges, which prevents blurring."""
    error = decoded - real
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


@cache
def _encode(vocabulary: CLIPTokenizer, text: str) -> Tensor:
    encoded: Any = vocabulary(
        text,
        padding="max_length",
        max_length=architecture.TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    tokens: Tensor = encoded.input_ids[0]
    return tokens


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _work(settings: TrainSettings) -> bool:
    """Run the selected stages, exporting after each; return False if interrupted."""
    trainer = Trainer(settings)
    if settings.stage == "export":
        trainer.export()
    for stage, share in STAGES.items():
        if settings.stage not in (None, stage):
            continue
        trainer.load()
        minutes = settings.minutes * (1.0 if settings.stage else share)
        finished: bool = getattr(trainer, stage)(minutes)
        trainer.export()
        if not finished:
            return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentforge.train.demo.train", description=__doc__.split("\n\n")[0],
        epilog="To get the images: npm pack emoji-datasource-google@16.0.0, and unpack it; PACKAGE "
        "is the folder 'package'. Ctrl-C stops without losing anything.",
    )  # fmt: skip
    add = parser.add_argument
    add("package", type=Path, metavar="PACKAGE", help="unpacked emoji-datasource-google 16.0.0")
    add("state", type=Path, metavar="STATE_DIR", help="state of the training, created or "
        "resumed; the result is STATE_DIR/checkpoint")  # fmt: skip
    add("--stage", choices=[*STAGES, "export"], help="run one stage only (default: all, in this "
        "order); export writes the checkpoint only, even during a training")  # fmt: skip
    add("--minutes", type=float, default=120.0, help="duration (default: 120); two hours on two "
        "slow cores give recognizable images")  # fmt: skip
    add("--batch", type=int, default=48, help="latents per step of the denoiser (default: 48)")
    add("--rate", type=float, default=5e-3, help="peak learning rate (default: 0.005)")
    add("--cooldown", type=float, default=0.3, help="share of the time at the end over which the "
        "learning rate falls to zero (default: 0.3); images sharpen most there")  # fmt: skip
    add("--start", type=Path, metavar="DIR", help="start with the autoencoder of this diffusers "
        "directory instead of random weights")  # fmt: skip
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when the time is up, 130 when interrupted."""
    settings = TrainSettings(**vars(_parser().parse_args(arguments)))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    signal.signal(signal.SIGTERM, _interrupt)
    return 0 if _work(settings) else 130


if __name__ == "__main__":
    sys.exit(main())
