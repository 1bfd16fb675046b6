"""Clean latents of pictures: what they are, and positions that processes share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.loader import load
from latentforge.train.distill.captioned_pictures import CaptionedPictures
from latentforge.train.distill.clean_latents import PictureLatents, Positions


@pytest.fixture
def pictures(tmp_path: Path) -> CaptionedPictures:
    """Return pictures whose shade is their caption."""
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"shade {number}")
    return CaptionedPictures.open(str(tmp_path))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_processes_share_the_positions() -> None:
    both = [Positions(process, 2) for process in range(2)]
    starts = [[each.take(3), each.take(3)] for each in both]
    assert starts == [[0, 6], [3, 9]] and both[0].state() == both[1].state() == {"position": 12}
    both[0].restore({"position": 6})
    assert both[0].take(3) == 6


def test_pictures_are_encoded_as_the_teacher_does(
    pictures: CaptionedPictures, tiny_engines: Path
) -> None:
    with load(tiny_engines, hashes=False) as pipeline:
        drawn = PictureLatents(pictures, pipeline).draw(2, generator())
        prompts = [picture.caption() for picture in pictures.take(0, 2)]
        settings = pipeline.settings(prompts, guidance_scale=3.0, negative_prompt="")
        encoded = pipeline.encode(settings)["encoder_hidden_states"]
    rows = drawn.free["encoder_hidden_states"], drawn.condition["encoder_hidden_states"]
    np.testing.assert_array_equal(torch.cat(rows).numpy(), encoded)
    assert drawn.latents.shape == (2, 4, 16, 16) and drawn.latents.isfinite().all()


def test_a_source_goes_on_from_a_position(pictures: CaptionedPictures, tiny_engines: Path) -> None:
    with load(tiny_engines, hashes=False) as pipeline:
        first, again = (PictureLatents(pictures, pipeline) for _ in range(2))
        first.draw(3, generator())
        again.restore(first.state())
        rows = first.draw(2, generator()), again.draw(2, generator())
        assert torch.equal(rows[0].latents, rows[1].latents)
        with pytest.raises(SettingsError, match="there are 4 pictures, and 5 when"):
            again.restore({"position": 0, "pictures": 5})
