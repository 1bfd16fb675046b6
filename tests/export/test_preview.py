"""Maps for previews: exact where the decoder is such a map, and close on the demo's images."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.export.preview import fit_preview, leaves, pooled
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.image import psnr, to_array
from latentforge.runtime.latent_colors import colors, features, quick_images
from latentforge.runtime.loader import EngineLoader, load
from latentforge.runtime.manifest import Latent, Manifest
from latentforge.runtime.tensor import Feeds, TensorSpec

Array = NDArray[np.float32]


class Decoder:
    """Session of a decoder that is a map of the latents and their products."""

    def __init__(self, weights: Array, factor: int = 8) -> None:
        self.weights, self.factor = weights, factor

    def run(self, feeds: Feeds) -> dict[str, Array]:
        cells = np.einsum(
            "kc,nchw->nkhw", self.weights, features(feeds["latent_sample"], products=True)
        )
        return {"sample": cells.repeat(self.factor, axis=2).repeat(self.factor, axis=3)}

    def close(self) -> None: ...


def with_decoder(
    monkeypatch: pytest.MonkeyPatch, handmade: Any, channels: int, weights: Array
) -> tuple[Manifest, Path]:
    """Return an engine directory of these channels, and let its decoder be such a map."""
    directory = handmade()
    latent = Latent(channels=channels, scaling_factor=1.0, downscale=8, multiple=1)
    manifest = Manifest.read(directory)
    cells = TensorSpec("float32", ("batch", channels, "latent_height", "latent_width"))
    decoder = msgspec.structs.replace(
        manifest.components["vae_decoder"], inputs={"latent_sample": cells}
    )
    components = {"vae_decoder": decoder}

    def load_engine(self: object, name: str, options: object) -> Engine:
        return Engine(name, decoder, Decoder(weights))  # type: ignore[arg-type]

    monkeypatch.setattr(EngineLoader, "__call__", load_engine)
    return msgspec.structs.replace(manifest, latent=latent, components=components), directory


@pytest.mark.parametrize("channels", [1, 4, 8, 16])
def test_a_map_is_found_where_the_decoder_is_one(
    monkeypatch: pytest.MonkeyPatch, handmade: Any, channels: int
) -> None:
    rng = np.random.default_rng(1)
    inputs = channels + channels * (channels + 1) // 2
    weights = rng.normal(0, 0.2 / inputs, (3, inputs)).astype(np.float32)
    preview = fit_preview(*with_decoder(monkeypatch, handmade, channels, weights))
    assert preview is not None and preview.correlation > 0.99
    latents = rng.normal(0, 0.5, (2, channels, 4, 6)).astype(np.float32)
    expected = np.einsum("kc,nchw->nkhw", weights, features(latents, products=True))
    np.testing.assert_allclose(colors(latents, preview), expected, atol=0.03)
    assert [image.size for image in quick_images(latents, preview)] == [(6, 4)] * 2


def test_many_channels_have_no_products(monkeypatch: pytest.MonkeyPatch, handmade: Any) -> None:
    weights = np.zeros((3, 40 + 820), np.float32)
    weights[:, :3] = np.eye(3) * 0.5
    preview = fit_preview(*with_decoder(monkeypatch, handmade, 40, weights))
    assert preview is not None and preview.products == ((), (), ()) and preview.correlation > 0.99


def test_a_decoder_of_one_colour(monkeypatch: pytest.MonkeyPatch, handmade: Any) -> None:
    preview = fit_preview(*with_decoder(monkeypatch, handmade, 4, np.zeros((3, 14), np.float32)))
    assert preview is not None and preview.correlation == 0 and preview.offset == (0, 0, 0)


def test_without_a_decoder_there_is_no_map(handmade: Any) -> None:
    directory = handmade()
    manifest = msgspec.structs.replace(Manifest.read(directory), components={})
    assert fit_preview(manifest, directory) is None
    with pytest.raises(ManifestError, match="no map for previews"):
        quick_images(np.zeros((1, 4, 2, 2), np.float32), None)


def test_leaves_have_all_colours_and_are_the_same_for_everyone() -> None:
    first, second = (leaves(np.random.default_rng(0), (32, 48), 3, 20) for _ in range(2))
    assert first.shape == (3, 32, 48) and first.tobytes() == second.tobytes()
    assert (first.std(axis=(1, 2)) > 0.2).all()


def test_previews_of_the_demo_are_its_images(demo_engines: Path) -> None:
    """Beside the mean of each cell; a grey picture would have less than half of these decibels."""
    with load(demo_engines, threads=1) as pipe:
        prompts = ["red apple on a blue background", "owl", "green cup", "yellow car"]
        *_, step = pipe.stream(prompts, seed=[0, 1, 2, 3], steps=10)
        expected = pooled(to_array(step.preview()), pipe.manifest.latent.downscale)
        found = to_array(step.quick_preview())
    correlation = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    assert psnr(expected, found, peak=2.0) > 18 and correlation > 0.9
    assert pipe.manifest.preview is not None and pipe.manifest.preview.correlation > 0.85
