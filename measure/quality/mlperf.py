"""Text-to-image protocol of MLPerf Inference, for Stable Diffusion XL.

5,000 captions of COCO 2014, 1024 x 1024 pixels, 20 Euler steps at guidance 8, one negative prompt,
one initial noise for all; then FID against the validation set's statistics and the CLIP score, both
of which have to lie within a band around the reference's, on either side. The numbers are from
mlcommons/inference, tools/submission/submission_checker/constants.py.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.prompts import read_prompts
from latentforge.measure.results import Metric
from latentforge.runtime.errors import GateError, SettingsError
from latentforge.runtime.files import read_file
from latentforge.runtime.settings import Request
from latentforge.runtime.text import one_line

__all__ = ["BANDS", "CAPTIONS", "FAMILY", "REQUEST", "check", "check_bands", "read_captions"]
__all__ += ["read_latents"]

CAPTIONS = 5000
_MAX_BYTES = 64 << 20
FAMILY = "stable_diffusion_xl"

BANDS: Mapping[str, tuple[float, float]] = {
    "clip": (31.68631873, 31.81331801),
    "fid": (23.01085758, 23.95007626),
}
"""Lower and upper bound: 0.2 % and 2 % around the float32 reference's."""

REQUEST: Request = {
    "sampler": "euler",
    "steps": 20,
    "guidance_scale": 8.0,
    "negative_prompt": "normal quality, low quality, worst quality, low res, blurry, nsfw, nude",
    "height": 1024,
    "width": 1024,
}


def read_captions(path: Path) -> list[str]:
    """Read the captions of a ``.tsv`` with a column ``caption``, or of a text file, one per line.

    Raises:
        SettingsError: the file is missing, or has no caption.
    """
    if path.suffix != ".tsv":
        return read_prompts(path)
    try:
        text = read_file(path, _MAX_BYTES).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"cannot read captions from {path}: {error}") from error
    captions = [text.strip() for row in rows if (text := row.get("caption") or "").strip()]
    if not captions:
        raise SettingsError(f"{path} has no captions in a column named caption")
    return captions


def read_latents(path: Path) -> NDArray[np.float32]:
    """Read the initial noise of the protocol, (1, channels, h, w), from its ``.npy``.

    Raises:
        SettingsError: the file is missing, or holds another kind of array.
    """
    if path.suffix == ".pt":
        raise SettingsError(f"{path} is a pickle: give the latents.npy that lies beside it")
    try:
        latents = np.load(io.BytesIO(read_file(path, _MAX_BYTES)), allow_pickle=False)
    except Exception as error:  # of the system, of zip or of numpy
        raise SettingsError(f"{path} is not an .npy of latents: {one_line(error)}") from error
    if not isinstance(latents, np.ndarray) or latents.ndim != 4 or len(latents) != 1:
        raise SettingsError(f"{path}: latents are one array (1, channels, h, w)")
    if not np.issubdtype(latents.dtype, np.floating) or not np.isfinite(latents).all():
        raise SettingsError(f"{path}: latents are finite floating-point numbers")
    return latents.astype(np.float32)


def check(
    *, captions: int, images: int, family: str, latents: bool, metrics: Sequence[str]
) -> None:
    """Refuse deviations from the protocol before hours are spent.

    Raises:
        SettingsError: names the deviation.
    """
    deviations = [
        (captions != CAPTIONS, f"{captions:,} captions were given, and it takes 5,000"),
        (images != CAPTIONS, f"{images:,} images were requested, and it takes 5,000"),
        (family != FAMILY, f"the engines are of {family}, and its band is for {FAMILY}"),
        (not latents, "it takes one initial noise for all: give its latents.npy with --latents"),
        ("fid" not in metrics, "FID needs --inception and --statistics, its val2014.npz"),
        ("clip" not in metrics, "the CLIP score needs --clip, a ViT-B/32"),
    ]
    for differs, reason in deviations:
        if differs:
            raise SettingsError(f"this is not MLPerf's protocol: {reason}; or leave out --preset")


def check_bands(metrics: Sequence[Metric]) -> None:
    """Check every subject's FID and CLIP score against the band.

    Raises:
        GateError: a value lies outside, on either side.
    """
    for metric in metrics:
        low, high = BANDS.get(metric.name, (-np.inf, np.inf))
        if not low <= metric.value <= high:
            raise GateError(
                f"{metric.subject}: {metric.name} is {metric.value:.4f} and MLPerf's band is "
                f"{low:.4f} to {high:.4f}"
            )
