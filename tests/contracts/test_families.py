"""Every family and every task: the engines reproduce the image of diffusers."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

pytest.importorskip("diffusers", exc_type=ImportError)

import torch
from diffusers import AutoencoderKL
from tiers import further, tiered
from tiny import DEPTH, EDITING, INPAINTING, TINY, UPSCALING
from transformers import CLIPTextModel, CLIPTokenizer

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import FAMILIES, ComponentPlan, family_of
from latentforge.export.models.flexible_unet import load_flexible_unet
from latentforge.export.modules import load_module
from latentforge.export.onnx import Dimensions
from latentforge.export.reference.eager import EagerPipeline
from latentforge.export.stage import ExportRequest, export
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.stage import optimize
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.files import hash_file
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.tensor import Feeds

SIDE = 32
REFINER = "sdxl-refiner"
OTHERS = (*EDITING, *DEPTH, *UPSCALING)
TEXT = [name for name in TINY if name not in (*INPAINTING, *OTHERS, REFINER)]
IMAGE = [name for name in TINY if name not in (*INPAINTING, *OTHERS)]
INPAINT = [name for name in TINY if name not in OTHERS]
FREE = ("bk-sdm", "decidiffusion-2", "sdxl-inpainting")
"""Families whose denoiser has free dimensions here, as other tests need it; others are fixed."""

FREE_BATCH = ("lcm", "sd-2", "upscaler")
"""Families of which the batch alone is free: their denoisers have inputs that those above lack, and
that of sd-2 runs with one row and with two. Free batches double the time of an export."""

Built = Callable[[str], tuple[Pipeline, EagerPipeline]]


@pytest.fixture(scope="module")
def built(
    tiny: Callable[[str], Path],
    tiny_engines: Path,
    tiny_denoiser: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Built]:
    """A function that returns a family's engines, built once, and diffusers' pipeline."""
    folder = tmp_path_factory.mktemp("families")
    opened = []

    exported = dict.fromkeys(identities(tiny("sd")).values(), tiny_engines)

    def engines(name: str) -> Path:
        if name == "sd":
            return tiny_engines
        keys = identities(tiny(name))
        if name in FREE:
            exported.setdefault(keys["denoiser"], tiny_denoiser(name))
        new = [part for part, key in keys.items() if key not in exported]
        # where all are lent, one is exported for the manifest: that of fixed sizes is the fastest
        batch = None if name in FREE_BATCH else 2 if new else 1
        sizes = Dimensions(height=SIDE, width=SIDE, batch=batch)
        new = new or [next(iter(keys))]
        export(
            str(tiny(name)), folder / name, ExportRequest(components=tuple(new), dimensions=sizes)
        )
        for part, key in keys.items():
            if key in exported:
                lend(part, exported[key], folder / name)
            exported.setdefault(key, folder / name)
        return folder / name

    @cache
    def both(name: str) -> tuple[Pipeline, EagerPipeline]:
        pipe = load(engines(name), threads=1)
        opened.append(pipe)
        return pipe, EagerPipeline(open_checkpoint(str(tiny(name))))

    yield both
    for pipe in opened:
        pipe.close()


def identities(path: Path) -> dict[str, tuple[str, ...]]:
    """Return a key of the graph of each component of a checkpoint."""
    checkpoint = open_checkpoint(str(path))
    parts = family_of(checkpoint).plan(checkpoint).components
    return {part.name: identity(checkpoint, part) for part in parts}


def identity(checkpoint: Checkpoint, part: ComponentPlan) -> tuple[str, ...]:
    """Return a key of a component's graph: some tiny checkpoints share components."""
    config = hash_file(checkpoint.path / part.folder / "config.json")
    return part.name, checkpoint.sha256(part.folder), "" if part.part == "vae" else config


def lend(part: str, source: Path, target: Path) -> None:
    """Copy a component that checkpoints share, since exporting it again takes seconds."""
    lender, borrower = Manifest.read(source), Manifest.read(target)
    shutil.copy(source / lender.components[part].file, target)
    plain = msgspec.structs.replace(lender.components[part], overflows_fp16=False)
    components = {**borrower.components, part: plain}
    msgspec.structs.replace(borrower, components=components).write(target)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A disc on a colour gradient."""
    ramp = np.linspace(0, 255, SIDE).astype(np.uint8)
    rows, columns = np.meshgrid(ramp, ramp, indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, 255 - rows], axis=-1))
    ImageDraw.Draw(image).ellipse((6, 8, 22, 26), fill=(230, 40, 90))
    return image


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White where the image is repainted: an ellipse, off centre."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).ellipse((10, 3, 29, 21), fill=255)
    return image


def check(ours: Result, theirs: Result) -> None:
    """Check that the images are equal, and not of a single colour."""
    assert len(ours.images) == len(theirs.images)
    assert psnr(theirs.latents, ours.latents) >= 40
    for mine, reference in zip(ours.images, theirs.images, strict=True):
        assert np.ptp(to_array([reference])) > 0.1
        assert psnr(to_array([reference]), to_array([mine]), peak=2.0) >= 40


def request(pipe: Pipeline, **changes: Any) -> dict[str, Any]:
    """Return a request of few steps; the squeezed samplers need 16."""
    squeezed = pipe.manifest.defaults.sampler.startswith("squeezed")
    return {"steps": 16 if squeezed else 4, "seed": 5, **changes}


@pytest.mark.parametrize("name", tiered(TEXT))
def test_text_to_image(built: Built, name: str) -> None:
    pipe, eager = built(name)
    settings = pipe.settings("a red fox", **request(pipe, negative_prompt="moon"))
    check(pipe.run(settings), eager(settings))


@pytest.mark.parametrize("name", tiered(IMAGE))
def test_image_to_image(built: Built, name: str, picture: Image.Image) -> None:
    pipe, eager = built(name)
    given = request(pipe, strength=0.6, guidance_rescale=0.0)
    settings = pipe.settings("a red fox", image=picture, **given)
    check(pipe.run(settings, image=picture), eager(settings, image=picture))


@pytest.mark.parametrize("name", tiered(INPAINT))
def test_inpainting(built: Built, name: str, picture: Image.Image, mask: Image.Image) -> None:
    inpaint(built, name, 0.6, picture, mask)


@pytest.mark.parametrize("name", tiered(["sd", "sdxl", *INPAINTING]))
def test_inpainting_from_noise(
    built: Built, name: str, picture: Image.Image, mask: Image.Image
) -> None:
    """At full strength diffusers draws random numbers in another order."""
    inpaint(built, name, 1.0, picture, mask)


def inpaint(
    built: Built, name: str, strength: float, picture: Image.Image, mask: Image.Image
) -> None:
    pipe, eager = built(name)
    given = request(pipe, strength=strength, guidance_rescale=0.0)
    settings = pipe.settings("a red fox", image=picture, mask=mask, **given)
    ours = pipe.run(settings, image=picture, mask=mask)
    check(ours, eager(settings, image=picture, mask=mask))


@pytest.mark.parametrize("name", tiered(INPAINTING))
def test_an_inpainting_model_without_an_image_makes_a_whole_one(built: Built, name: str) -> None:
    pipe, eager = built(name)
    settings = pipe.settings("a red fox", **request(pipe))
    check(pipe.run(settings), eager(settings))


@pytest.mark.parametrize("name", tiered(EDITING))
def test_editing(built: Built, name: str, picture: Image.Image) -> None:
    """Two guidance scales, and a third row for each image."""
    pipe, eager = built(name)
    given = request(pipe, negative_prompt="moon", image_guidance_scale=1.8)
    settings = pipe.settings("make it snow", image=picture, **given)
    check(pipe.run(settings, image=picture), eager(settings, image=picture))


@pytest.mark.parametrize("name", tiered(DEPTH))
def test_depth_to_image(built: Built, name: str, picture: Image.Image, mask: Image.Image) -> None:
    """The depth map is of another size and shape than the image."""
    pipe, eager = built(name)
    images = {"image": picture, "depth_map": mask.convert("L").resize((50, 43))}
    settings = pipe.settings("a red fox", image=picture, **request(pipe, strength=0.6))
    check(pipe.run(settings, **images), eager(settings, **images))


@pytest.mark.parametrize("name", tiered(UPSCALING))
def test_upscaling(built: Built, name: str, picture: Image.Image) -> None:
    """The image has the size of the latents, and noise of its own schedule."""
    pipe, eager = built(name)
    small = picture.resize((SIDE // 2, SIDE // 2))
    pictures = []
    for level in (20, 300):
        settings = pipe.settings("a red fox", image=small, **request(pipe, noise_level=level))
        ours = pipe.run(settings, image=small)
        assert ours.images[0].size == (SIDE, SIDE)
        check(ours, eager(settings, image=small))
        pictures.append(ours.latents)
    assert psnr(*pictures) < 60


@pytest.mark.parametrize("name", tiered([name for name in TINY if not name.endswith("-turbo")]))
def test_optimized(built: Built, name: str, tmp_path: Path) -> None:
    """Fused, with a UNet partitioned into parts per prompt, per schedule and per step.

    The UNets of the turbo models are those of their families.
    """
    request = OptimizeRequest(
        settings={"steps": 2, "sampler": "euler"},
        gate=("images=1", "latents_psnr=100"),
        repeats=0,
    )
    manifest = optimize(built(name)[0].directory, tmp_path / "out", request)
    assert {"denoiser_prompt", "denoiser_time"} <= manifest.components.keys()
    attentions, crossing = (
        manifest.history[-1].passes[f"denoiser/{key}"] for key in ("fuse-attention", "hoist-prompt")
    )
    # Half of the attentions are cross-attention, whose keys and values run once a prompt; beside
    # these do SDXL's embeddings of pooled prompt and sizes. An upscaler has more cross-attention.
    limit = 2 * attentions if name in UPSCALING else attentions + 2
    assert attentions <= crossing <= limit


def test_every_family_is_tested() -> None:
    """The tables above cover the table of families."""
    classes = {architecture.pipeline for architecture in TINY.values()}
    for family in FAMILIES:
        assert classes & set(family.pipelines), family.name


# Differences between families


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "guidance", "rescale"),
    [
        ("sd", "pndm", 50, 7.5, 0.0),
        ("sdxl", "euler", 50, 5.0, 0.0),
        ("pix2pix", "pndm", 100, 7.5, 0.0),
        ("upscaler", "ddim", 75, 9.0, 0.0),
        ("decidiffusion-1", "ddim", 30, 7.5, 0.7),
        *further(
            ("sd-2", "ddim", 50, 7.5, 0.0),
            ("sd-turbo", "euler", 1, 0.0, 0.0),
            ("lcm", "lcm", 4, 8.5, 0.0),
            ("sdxl-turbo", "euler_ancestral", 1, 0.0, 0.0),
            ("sdxl-pix2pix", "euler", 100, 5.0, 0.0),
            ("decidiffusion-2", "squeezed_10", 16, 7.5, 0.8),
        ),
    ],
)
def test_defaults(
    built: Built, name: str, sampler: str, steps: int, guidance: float, rescale: float
) -> None:
    defaults = built(name)[0].manifest.defaults
    assert (defaults.sampler, defaults.steps) == (sampler, steps)
    assert (defaults.guidance_scale, defaults.guidance_rescale) == (guidance, rescale)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "rows"), [("sd-2", 2), ("sd-turbo", 1), ("lcm", 1)])
def test_distilled_models_run_one_row_per_image(
    built: Built, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without guidance, or with embedded guidance, no unconditional rows are computed."""
    pipe, _ = built(name)
    unet = pipe.engines["denoiser"].session
    run, seen = unet.run, []

    def counted(feeds: Feeds) -> Any:
        seen.append(len(feeds["sample"]))
        return run(feeds)

    monkeypatch.setattr(unet, "run", counted)
    result = pipe("a fox", steps=2, seed=0)
    assert seen == [rows] * 2 and len(result.timings.stages["denoiser"]) == 2


@pytest.mark.thorough
def test_guidance_of_a_consistency_model_is_an_input(built: Built) -> None:
    pipe, eager = built("lcm")
    assert "timestep_cond" in pipe.manifest.components["denoiser"].inputs
    pictures = []
    for scale in (1.5, 8.5, 14.0):
        settings = pipe.settings("a fox", **request(pipe, guidance_scale=scale))
        ours = pipe.run(settings)
        check(ours, eager(settings))
        pictures.append(to_array(ours.images))
    assert psnr(pictures[0], pictures[2], peak=2.0) < 60


@pytest.mark.parametrize("negative", [None, "", "moon"])
def test_negative_prompts_of_none_and_of_an_empty_string(
    built: Built, negative: str | None
) -> None:
    """Stable Diffusion XL was trained with zeros for None."""
    pipe, eager = built("sdxl")
    given = {} if negative is None else {"negative_prompt": negative}
    settings = pipe.settings("a fox", **request(pipe, **given))
    check(pipe.run(settings), eager(settings))


def test_none_and_empty_differ(built: Built) -> None:
    pipe, _ = built("sdxl")
    none, empty = (
        pipe("a fox", **request(pipe, **given)).latents for given in ({}, {"negative_prompt": ""})
    )
    assert psnr(none, empty) < 60


def test_sizes_condition_the_unet(built: Built) -> None:
    pipe, eager = built("sdxl")
    sizes = {"original_size": (640, 480), "crop": (16, 8), "target_size": (512, 256)}
    settings = pipe.settings("a fox", **request(pipe, **sizes))
    ours = pipe.run(settings)
    check(ours, eager(settings))
    assert psnr(ours.latents, pipe("a fox", **request(pipe)).latents) < 80


@pytest.mark.thorough
def test_refiner_continues_from_the_base(built: Built) -> None:
    """An ensemble of two engine directories: Podell et al. (2023), section 2.5."""
    (base, eager_base), (refiner, eager_refiner) = built("sdxl"), built(REFINER)
    half = request(base, steps=8, denoising_end=0.6)
    first = base.settings("a fox", **half)
    ours, theirs = base.run(first), eager_base(first)
    rest = request(base, steps=8, denoising_start=0.6)
    second = refiner.settings("a fox", image=ours.latents, **rest)
    check(
        refiner.run(second, image=ours.latents),
        eager_refiner(second, image=torch.from_numpy(theirs.latents)),
    )


@pytest.mark.thorough
def test_aesthetic_scores_condition_the_unet(built: Built, picture: Image.Image) -> None:
    pipe, eager = built(REFINER)
    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    settings = pipe.settings("a fox", image=picture, **request(pipe, strength=0.7, **scores))
    ours = pipe.run(settings, image=picture)
    check(ours, eager(settings, image=picture))
    plain = pipe("a fox", image=picture, **request(pipe, strength=0.7))
    assert psnr(ours.latents, plain.latents) < 80


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("sdxl-pix2pix", {"is_cosxl_edit": True}, "noise schedule is continuous"),
        ("upscaler", {"max_noise_level": 1000}, "up to 1000, but the UNet has 1000 classes"),
        ("upscaler", {"max_noise_level": "350"}, "must be an integer of at least 0, not '350'"),
        ("upscaler", {"max_noise_level": -1}, "must be an integer of at least 0, not -1"),
    ],
)
def test_refuses_an_index_that_no_engine_follows(
    tiny: Callable[[str], Path], name: str, entry: dict[str, object], message: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(name)))
    other = replace(checkpoint, index={**checkpoint.index, **entry})
    with pytest.raises(CheckpointError, match=message):
        family_of(other).plan(other)


@pytest.mark.parametrize(("given", "default"), [({}, 20), ({"max_noise_level": 7}, 7)])
def test_the_default_noise_level_is_one_that_the_model_has(
    tiny: Callable[[str], Path], given: dict[str, object], default: int
) -> None:
    checkpoint = open_checkpoint(str(tiny("upscaler")))
    other = replace(checkpoint, index={**checkpoint.index, **given})
    assert family_of(other).plan(other).defaults.noise_level == default


@pytest.mark.parametrize(("name", "overflows_fp16"), [("sd", False), ("sdxl", True)])
def test_components_that_overflow_fp16_are_marked(
    tiny: Callable[[str], Path], name: str, overflows_fp16: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny(name)))
    components = family_of(checkpoint).plan(checkpoint).components
    marked = {component.name for component in components if component.overflows_fp16}
    assert marked == ({"vae_decoder", "vae_encoder"} if overflows_fp16 else set())


def test_the_placeholder_is_never_read(tiny: Callable[[str], Path], built: Built) -> None:
    checkpoint = open_checkpoint(str(tiny("decidiffusion-1")))
    folders = {component.folder for component in family_of(checkpoint).plan(checkpoint).components}
    assert "flexible_unet" in folders and "unet" not in folders
    assert "flexible_unet" in Manifest.read(built("decidiffusion-1")[0].directory).source.sha256


# A separate loop for DeciDiffusion from the papers' equations; it shares only the UNet

SQUEEZED = [998, 936, 873, 811, 748, 686, 548, 411, 274, 137]


def cosine(zero_terminal_snr: bool) -> NDArray[np.float64]:
    """alpha**2 by timestep: Nichol & Dhariwal (2021), and Lin et al. (2023), algorithm 1."""
    t = np.arange(1001) / 1000
    level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    root = np.sqrt(np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999)))
    if zero_terminal_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.asarray(root**2, np.float64)


class Loop:
    """Guided, rescaled v prediction of an eager flexible UNet."""

    def __init__(self, path: Path, prompt: str, *, scale: float, rescale: float) -> None:
        checkpoint = open_checkpoint(str(path))
        self.unet = load_flexible_unet(checkpoint)
        self.vae = load_module(checkpoint, "vae", AutoencoderKL)
        text = load_module(checkpoint, "text_encoder", CLIPTextModel)
        tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
        ids = tokenizer(["", prompt], padding="max_length", return_tensors="pt").input_ids
        self.prompts = text(ids).last_hidden_state
        self.scale, self.rescale = scale, rescale

    def velocity(self, x: torch.Tensor, timestep: int) -> torch.Tensor:
        rows = torch.cat([x, x]).float()
        off, on = self.unet(rows, timestep, self.prompts, return_dict=False)[0].double().chunk(2)
        guided = off + self.scale * (on - off)
        ratio = on.std(dim=(1, 2, 3)) / guided.std(dim=(1, 2, 3))
        return guided * (self.rescale * ratio + 1 - self.rescale)

    def noise(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((1, 4, SIDE // 2, SIDE // 2), generator=generator).double()

    def picture(self, x: torch.Tensor) -> NDArray[np.float32]:
        pixels = self.vae.decode((x / self.vae.config.scaling_factor).float()).sample
        return np.asarray(pixels.numpy(), np.float32)


def ddim(loop: Loop, steps: int, seed: int) -> torch.Tensor:
    """DeciDiffusion 1.0: trailing timesteps, zero terminal SNR, ending on the first timestep."""
    square, x = cosine(zero_terminal_snr=True), loop.noise(seed)
    for t in (np.arange(1000, 0, -1000 / steps).round() - 1).astype(int).tolist():
        after = square[max(t - 1000 // steps, 0)]
        alpha, sigma = np.sqrt(square[t]), np.sqrt(1 - square[t])
        v = loop.velocity(x, t)
        x = np.sqrt(after) * (alpha * x - sigma * v) + np.sqrt(1 - after) * (alpha * v + sigma * x)
    return x


def squeezed(loop: Loop, seed: int) -> torch.Tensor:
    """DeciDiffusion 2.0: DPM-Solver++ of order two, type "heun", in ten uneven steps."""
    square, x = cosine(zero_terminal_snr=False), loop.noise(seed)
    alpha, sigma = np.sqrt(square), np.sqrt(1 - square)
    log_snr = np.log(alpha / sigma)
    before: tuple[int, torch.Tensor] | None = None
    for s, t in pairwise([*SQUEEZED, 0]):
        clean = alpha[s] * x - sigma[s] * loop.velocity(x, s)
        h = log_snr[t] - log_snr[s]
        shrink = np.expm1(-h)
        after = sigma[t] / sigma[s] * x - alpha[t] * shrink * clean
        if before is not None and t > 0:
            slope = (clean - before[1]) * h / (log_snr[s] - log_snr[before[0]])
            after = after + alpha[t] * (shrink / h + 1) * slope
        before, x = (s, clean), after
    return x


@pytest.mark.parametrize("name", tiered(["decidiffusion-1", "decidiffusion-2"]))
def test_decidiffusion_against_a_separate_loop(
    built: Built, tiny: Callable[[str], Path], name: str
) -> None:
    pipe, _ = built(name)
    defaults = pipe.manifest.defaults
    scales = {"scale": defaults.guidance_scale, "rescale": defaults.guidance_rescale}
    with torch.inference_mode():
        loop = Loop(tiny(name), "a red fox", **scales)
        x = squeezed(loop, 7) if name.endswith("2") else ddim(loop, defaults.steps, 7)
        expected = loop.picture(x)
    ours = pipe("a red fox", seed=7)
    assert np.ptp(expected) > 0.1
    assert psnr(x.numpy(), ours.latents) >= 40
    assert psnr(np.clip(expected, -1, 1), to_array(ours.images), peak=2.0) >= 40
