"""Autoencoders other than AutoencoderKL: images equal to those of diffusers' pipelines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers", exc_type=ImportError)

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    StableDiffusionXLImg2ImgPipeline,
)

from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.onnx import Dimensions
from latentforge.export.reference.eager import EagerPipeline
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.rng import Generator
from latentforge.runtime.vae import Posterior

SIDE = 32
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "tiny": (
        AutoencoderTiny,
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
            "scaling_factor": 0.7,
            "latent_magnitude": 2,
            "latent_shift": 0.4,
        },
    ),
    "asymmetric": (
        AsymmetricAutoencoderKL,
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (16, 32),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (24, 48),
            "layers_per_up_block": 2,
            "norm_num_groups": 8,
        },
    ),
}
Built = tuple[Pipeline, EagerPipeline]


def with_vae(path: Path, name: str, **changes: Any) -> Path:
    """Replace the VAE of a checkpoint by one of another class."""
    kind, options = KINDS[name]
    shutil.rmtree(path / "vae")
    torch.manual_seed(3)
    kind(**options | changes).save_pretrained(path / "vae")
    index = path / "model_index.json"
    content = {**json.loads(index.read_text()), "vae": ["diffusers", kind.__name__]}
    index.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module", params=KINDS)
def built(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_engines: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Engines of a VAE beside the others of the tiny checkpoint, and diffusers' pipeline."""
    folder = tmp_path_factory.mktemp("autoencoders")
    checkpoint = with_vae(shutil.copytree(tiny_checkpoint, folder / "checkpoint"), request.param)
    sizes = Dimensions(height=SIDE, width=SIDE, batch=1)  # the fastest to export
    chosen = ExportRequest(components=("vae_decoder", "vae_encoder"), dimensions=sizes)
    manifest = export(str(checkpoint), folder / "engines", chosen)
    assert manifest.components.keys() == {"vae_decoder", "vae_encoder"}
    lent = Manifest.read(tiny_engines).components
    for name in lent.keys() - manifest.components.keys():
        shutil.copy(tiny_engines / lent[name].file, folder / "engines")
    components = {**lent, **manifest.components}
    msgspec.structs.replace(manifest, components=components).write(folder / "engines")
    with load(folder / "engines", threads=1) as pipe:
        yield pipe, EagerPipeline(open_checkpoint(str(checkpoint)))


def check(built: Built, **tasks: Any) -> None:
    pipe, eager = built
    strength = {"strength": 0.6} if tasks else {}
    sizes = {"height": SIDE, "width": SIDE}
    settings = pipe.settings("a red fox", steps=3, seed=5, **sizes, **strength, **tasks)
    ours, theirs = pipe.run(settings, **tasks), eager(settings, **tasks)
    assert psnr(theirs.latents, ours.latents) >= 80
    reference = to_array(theirs.images)
    assert np.ptp(reference) > 0.1
    assert psnr(reference, to_array(ours.images), peak=2.0) >= 50


@pytest.fixture
def picture() -> Image.Image:
    ramp = np.linspace(0, 255, SIDE).astype(np.uint8)
    rows, columns = np.meshgrid(ramp, ramp, indexing="ij")
    return Image.fromarray(np.stack([rows, columns, 255 - rows], axis=-1))


def test_text_to_image(built: Built) -> None:
    check(built)


def test_previews(built: Built) -> None:
    pipe, _ = built
    step = next(pipe.stream("a red fox", steps=2, height=SIDE, width=SIDE))
    side = SIDE // pipe.manifest.latent.downscale
    assert [image.size for image in step.quick_preview()] == [(side, side)]


def test_image_to_image(built: Built, picture: Image.Image) -> None:
    check(built, image=picture)


def test_inpainting(built: Built, picture: Image.Image) -> None:
    """diffusers gives the decoder of an AsymmetricAutoencoderKL the image and the mask too."""
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (8, 4, 28, 20))
    if built[0].manifest.latent.masked_decoder:
        with pytest.raises(SettingsError, match="AsymmetricAutoencoderKL"):
            check(built, image=picture, mask=mask)
    else:
        check(built, image=picture, mask=mask)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {"encoder_block_out_channels": (8,), "num_encoder_blocks": (1,)}),
        ("tiny", {"upsampling_scaling_factor": 4}),
        ("tiny", {"out_channels": 4}),
        ("tiny", {"shift_factor": 0.5}),
        (
            "asymmetric",
            {"down_block_out_channels": (16,), "down_block_types": ("DownEncoderBlock2D",)},
        ),
    ],
    ids=str,
)
def test_autoencoders_that_do_not_fit(
    tiny_checkpoint: Path, copy: Callable[[Path], Path], name: str, changes: dict[str, Any]
) -> None:
    path = with_vae(copy(tiny_checkpoint), name, **changes)
    opened = open_checkpoint(str(path))
    with pytest.raises(CheckpointError, match="shift_factor|levels") as caught:
        family_of(opened).plan(opened)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "upcast"), [("kl", True), ("tiny", False), ("asymmetric", False)])
def test_autoencoders_that_overflow_half_precision_in_xl(
    tiny: Callable[[str], Path], copy: Callable[[Path], Path], name: str, upcast: bool
) -> None:
    path = tiny("sdxl") if name == "kl" else with_vae(copy(tiny("sdxl")), name)
    opened = open_checkpoint(str(path))
    decoder = family_of(opened).plan(opened).components[-2]
    assert decoder.overflows_fp16 is upcast


def test_optimum_has_no_tiny_autoencoder(
    tiny_checkpoint: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = with_vae(copy(tiny_checkpoint), "tiny")
    with pytest.raises(SettingsError, match="no optimum pipeline supports the VAE"):
        export(str(path), tmp_path / "out", ExportRequest(layout="optimum"))


def test_normalized_latents_of_xl(
    tiny: Callable[[str], Path], copy: Callable[[Path], Path], picture: Image.Image
) -> None:
    """Playground 2.5 has a mean and a deviation by channel, which diffusers uses in XL."""
    path = copy(tiny("sdxl"))
    config = path / "vae" / "config.json"
    statistics = {"latents_mean": [-1.6, 1.1, -0.6, 1], "latents_std": [8.4, 5.9, 4.3, 5]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **statistics}))
    opened = open_checkpoint(str(path))
    plan = family_of(opened).plan(opened)
    decoder, encoder = (part.load(opened) for part in plan.components[-2:])
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.from_numpy(to_array([picture]))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    with torch.inference_mode():
        theirs = pipe.prepare_latents(
            pixels, torch.tensor([1]), 1, 1, torch.float32, "cpu", seeded(), add_noise=False
        )
        posterior = Posterior(parameters=encoder(pixels).numpy(), latent=plan.latent)
        assert psnr(theirs.numpy(), posterior.sample(Generator(7).randn)) > 100
        latents, images = (
            pipe(
                "a fox", image=picture, num_inference_steps=4, generator=seeded(), output_type=kind
            )
            for kind in ("latent", "pt")
        )
        ours = decoder(latents.images / plan.latent.scaling_factor)
    assert psnr(images.images.numpy(), (ours.numpy() / 2 + 0.5).clip(0, 1)) > 80


@pytest.mark.parametrize("given", [{"latents_mean": [1.0] * 4}, {"latents_std": [2.0] * 4}])
def test_half_of_a_normalization(
    tiny: Callable[[str], Path], copy: Callable[[Path], Path], given: dict[str, Any]
) -> None:
    path = copy(tiny("sdxl"))
    config = path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **given}))
    opened = open_checkpoint(str(path))
    with pytest.raises(CheckpointError, match=next(iter(given))):
        family_of(opened).plan(opened)
