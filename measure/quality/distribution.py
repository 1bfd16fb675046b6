"""Distances between two sets of images by a network's features: FID, KID, IS, CMMD.

FID, KID and IS are computed by torchmetrics. Intervals come from resampling images, which repeats
some of them and biases all these metrics; therefore only the spread of the resampled values is
used, around the value. An interval shows how much the choice of images matters, not the bias that
FID, IS and CMMD have with few images.
"""

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from latentforge.measure.quality import intervals
from latentforge.measure.results import ConfidenceInterval
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.files import read_file
from latentforge.runtime.text import one_line
from latentforge.runtime.validation import check_number

__all__ = ["Statistics", "clip_score", "cmmd", "fid", "inception_score", "kid"]

Array = NDArray[np.floating]
Kernel = Callable[[Array, Array], NDArray[np.float64]]
Mean = Callable[[Array, Array], NDArray[np.float64]]

_MAX_BYTES = 1 << 30
_FID_DRAWS = 50  # each costs an eigenvalue problem as wide as the features
_SUBSETS, _SUBSET = 100, 1000  # of KID: Bińkowski et al. (2018), the usual setting
_SPLITS, _SPLIT_FROM = 10, 5000  # of IS: Salimans et al. (2016) split 50,000 into ten
_KERNEL_IMAGES = 4000  # a kernel matrix of more does not fit every memory
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Normal distribution of features, which FID keeps of images that are not available.

    Attributes:
        mu: mean, (width,).
        sigma: covariance, (width, width).
    """

    mu: Array
    sigma: Array

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Read the ``.npz`` of ``mu`` and ``sigma`` that pytorch-fid and similar tools write.

        Raises:
            SettingsError: the file is missing, or holds something else.
        """
        try:
            content = io.BytesIO(read_file(path, _MAX_BYTES))
            with zipfile.ZipFile(content) as parts:
                if sum(part.file_size for part in parts.infolist()) > _MAX_BYTES:
                    raise ValueError("it is larger than such statistics are")
            with np.load(content, allow_pickle=False) as file:
                mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        except Exception as error:  # of the system, of zip or of numpy
            raise SettingsError(
                f"{path} is not an .npz of mu and sigma: {one_line(error)}"
            ) from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(sigma).all():
            raise SettingsError(f"{path}: mu is (width,) and sigma (width, width), finite")
        return cls(mu=mu, sigma=sigma)


@checked_arguments
def fid(
    candidate: Array, reference: Array | Statistics, *, paired: bool = False, seed: int = 0
) -> ConfidenceInterval:
    """Return the Fréchet distance of normal distributions: Heusel et al. (2017), equation 6.

    arXiv 1706.08500.

    The interval is the value plus and minus 1.96 standard deviations of 50 resampled values.

    Args:
        candidate: features (n, width).
        reference: features (m, width), or the distribution itself.
        paired: both have the same prompts and seeds in order, and are resampled together.
        seed: of the resampling.

    Raises:
        ShapeError: fewer than two images, or features of another width.
    """
    if isinstance(reference, Statistics):
        _check("fid", candidate, reference.mu[None].repeat(2, axis=0), seed)
        value = _torch_fid(candidate, reference)
        spread = [_closed_form(_moments(candidate, w), reference) for w in _draws(candidate, seed)]
    else:
        _check("fid", candidate, reference, seed)
        candidate, reference = _in_span(candidate, reference)
        value = _torch_fid(candidate, reference)
        pairs = zip(
            _draws(candidate, seed), _draws(reference, seed if paired else seed + 1), strict=True
        )
        spread = [_closed_form(_moments(candidate, v), _moments(reference, w)) for v, w in pairs]
    half = 1.96 * float(np.std(spread, ddof=1))
    return ConfidenceInterval(
        value=value, low=max(0.0, value - half), high=value + half, level=intervals.LEVEL
    )


@checked_arguments
def kid(
    candidate: Array, reference: Array, *, paired: bool = False, seed: int = 0
) -> ConfidenceInterval:
    """Return the unbiased squared MMD of a cubic kernel: Bińkowski et al. (2018), arXiv 1801.01401.

    Over 100 subsets of 1,000 images, or once over all where there are no more. As in the value, no
    image is paired with itself in the resampled values.

    Raises:
        ShapeError: fewer than two images, or features of another width.
    """
    _check("kid", candidate, reference, seed)
    size = min(len(candidate), len(reference), _SUBSET)
    once = len(candidate) == len(reference) == size
    with _quiet(seed):
        metric = KernelInceptionDistance(
            feature=torch.nn.Identity(), subsets=1 if once else _SUBSETS, subset_size=size
        )
        metric.update(_tensor(candidate), real=False)
        metric.update(_tensor(reference), real=True)
        value = float(metric.compute()[0])
    draws = _resampled(_cubic, candidate, reference, mean=_mean_apart, paired=paired, seed=seed)
    return intervals.centred(value, draws)


@checked_arguments
def cmmd(
    candidate: Array, reference: Array, *, paired: bool = False, seed: int = 0
) -> ConfidenceInterval:
    """Return 1,000 times the squared MMD of CLIP embeddings: Jayasumana et al. (2024), 2401.09603.

    A Gaussian kernel with sigma 10 on unit vectors, each image also paired with itself, as in the
    authors' implementation. Published figures use ViT-L/14 at 336 pixels.

    Raises:
        ShapeError: fewer than two images, or embeddings of another width.
    """
    _check("cmmd", candidate, reference, seed)
    a, b = _unit(candidate), _unit(reference)
    value = _gaussian(a, a).mean() + _gaussian(b, b).mean() - 2 * _gaussian(a, b).mean()
    draws = _resampled(_gaussian, a, b, mean=_mean_of_all, paired=paired, seed=seed)
    found = intervals.centred(_CMMD_SCALE * max(0.0, float(value)), _CMMD_SCALE * draws)
    return msgspec.structs.replace(found, low=max(0.0, found.low or 0.0))


@checked_arguments
def inception_score(logits: Array, *, seed: int = 0) -> ConfidenceInterval:
    """Return exp of the mean KL divergence to the mean: Salimans et al. (2016), arXiv 1606.03498.

    Averaged over ten splits from 5,000 images on, else over one.

    Args:
        logits: (n, classes) before the softmax.
        seed: of the splits and of the resampling.

    Raises:
        ShapeError: fewer than two images.
    """
    _check("is", logits, logits, seed)
    with _quiet(seed):
        metric = InceptionScore(
            feature=torch.nn.Identity(), splits=_SPLITS if len(logits) >= _SPLIT_FROM else 1
        )
        metric.update(_tensor(logits))
        value = float(metric.compute()[0])
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    weights = intervals.resample_counts(len(p), seed=seed) / len(p)
    divergence = weights @ _plogp(p).sum(axis=1) - _plogp(weights @ p).sum(axis=1)
    return intervals.centred(value, np.exp(divergence))


@checked_arguments
def clip_score(pictures: Array, texts: Array, *, seed: int = 0) -> ConfidenceInterval:
    """Return 100 times the mean cosine of embeddings (n, width), clipped at 0: Hessel (2021).

    arXiv 2104.08718 scales by 2.5; torchmetrics and MLPerf use 100.
    """
    _check("clip", pictures, texts, seed, minimum=1)
    cosines = (_unit(pictures) * _unit(texts)).sum(axis=1)
    return intervals.mean(100 * np.maximum(cosines, 0), seed=seed)


def _check(name: str, candidate: Array, reference: Array, seed: int, *, minimum: int = 2) -> None:
    check_number("seed", seed, 0, 2**63)
    for features in (candidate, reference):
        floats = np.issubdtype(features.dtype, np.floating)
        if not floats or features.ndim != 2 or not np.isfinite(features).all():
            raise ShapeError(
                f"{name}: features are finite floats (images, width), not {features.dtype} of "
                f"shape {list(features.shape)}"
            )
    if min(len(candidate), len(reference)) < minimum:
        raise ShapeError(f"{name} needs {minimum} images or more: generate more with --images")
    if candidate.shape[1] != reference.shape[1]:
        raise ShapeError(
            f"{name}: features of {candidate.shape[1]} and {reference.shape[1]} numbers cannot be "
            "compared: use the network that made the others"
        )


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float64))


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Silence the library's warnings, and seed torch without touching the global generator."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def _torch_fid(candidate: Array, reference: Array | Statistics) -> float:
    network = torch.nn.Identity()
    network.num_features = candidate.shape[1]
    metric = FrechetInceptionDistance(feature=network)
    metric.update(_tensor(candidate), real=False)
    if isinstance(reference, Statistics):
        mu, sigma = _tensor(reference.mu), _tensor(reference.sigma)
        # The state that two images of this mean and covariance would have left.
        metric.real_features_sum = 2 * mu
        metric.real_features_cov_sum = sigma + 2 * torch.outer(mu, mu)
        metric.real_features_num_samples = torch.tensor(2)
    else:
        metric.update(_tensor(reference), real=True)
    return max(0.0, float(metric.compute()))


def _in_span(candidate: Array, reference: Array) -> tuple[Array, Array]:
    """Project features to their common span: fewer numbers with the same distances."""
    both = np.concatenate([candidate, reference]).astype(np.float64)
    if len(both) >= both.shape[1]:
        return candidate, reference
    basis, _ = np.linalg.qr(both.T)
    return both[: len(candidate)] @ basis, both[len(candidate) :] @ basis


def _draws(features: Array, seed: int) -> NDArray[np.float64]:
    return intervals.resample_counts(len(features), draws=_FID_DRAWS, seed=seed)


def _moments(features: Array, weights: Array) -> Statistics:
    n = weights.sum()
    mu = weights @ features / n
    centred = (features - mu) * np.sqrt(weights / (n - 1))[:, None]
    return Statistics(mu=mu, sigma=centred.T @ centred)


def _closed_form(a: Statistics, b: Statistics) -> float:
    """Return the distance by eigenvalues of symmetric matrices alone."""
    values, vectors = np.linalg.eigh(b.sigma)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    inner = np.linalg.eigvalsh(root @ a.sigma @ root)
    traces = np.trace(a.sigma) + np.trace(b.sigma)
    return float(np.square(a.mu - b.mu).sum() + traces - 2 * np.sqrt(np.maximum(inner, 0)).sum())


def _cubic(a: Array, b: Array) -> NDArray[np.float64]:
    kernel: NDArray[np.float64] = (a.astype(np.float64) @ b.T / a.shape[1] + 1) ** 3
    return kernel


def _gaussian(a: Array, b: Array) -> NDArray[np.float64]:
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
    kernel: NDArray[np.float64] = np.exp(-squares / (2 * _CMMD_SIGMA**2))
    return kernel


def _resampled(
    kernel: Kernel, candidate: Array, reference: Array, *, mean: Mean, paired: bool, seed: int
) -> NDArray[np.float64]:
    """Return squared MMDs of resamples of the first 4,000 images, scaled to the full number."""
    a, b = candidate[:_KERNEL_IMAGES], reference[:_KERNEL_IMAGES]
    v = intervals.resample_counts(len(a), seed=seed)
    w = v if paired else intervals.resample_counts(len(b), seed=seed + 1)
    cross = ((v @ kernel(a, b)) * w).sum(axis=1) / (len(a) * len(b))
    draws = mean(v, kernel(a, a)) + mean(w, kernel(b, b)) - 2 * cross
    shrunk: NDArray[np.float64] = draws * np.sqrt(len(a) / len(candidate))
    return shrunk


def _mean_of_all(weights: Array, kernel: Array) -> NDArray[np.float64]:
    """Return the weighted mean of a kernel over all pairs, (draws,)."""
    mean: NDArray[np.float64] = ((weights @ kernel) * weights).sum(axis=1) / len(kernel) ** 2
    return mean


def _mean_apart(weights: Array, kernel: Array) -> NDArray[np.float64]:
    """Return the mean over pairs of two different images; NaN where there are none."""
    pairs = weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1)
    whole = ((weights @ kernel) * weights).sum(axis=1)
    apart: NDArray[np.float64] = whole - np.square(weights) @ np.diag(kernel)
    mean: NDArray[np.float64] = np.full_like(apart, np.nan)
    np.divide(apart, pairs, out=mean, where=pairs > 0)
    return mean


def _unit(vectors: Array) -> NDArray[np.float64]:
    wide = np.asarray(vectors, np.float64)
    unit: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _plogp(p: Array) -> NDArray[np.float64]:
    wide = np.asarray(p, np.float64)
    logs: NDArray[np.float64] = wide * np.log(np.maximum(wide, np.finfo(np.float64).tiny))
    return logs
