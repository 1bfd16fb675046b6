"""Sizes that engines are built for: parsing, combining, choosing, and storing in a manifest."""

import numpy as np
import pytest

from latentforge.commands.arguments import parse_ranges
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import ManifestError, SettingsError, ShapeError
from latentforge.runtime.manifest import Component, Manifest
from latentforge.runtime.shapes import (
    ANY,
    Range,
    Sizes,
    bounding_range,
    format_shapes,
    nearest,
)
from latentforge.runtime.tensor import Feeds, TensorSpec

SPEC = TensorSpec("float32", ("batch", 4, "latent_height", "latent_width"))
SCALED = TensorSpec("float32", ("batch", 3, "latent_height*8", "latent_width*8"))


def component(**changes: object) -> Component:
    fields: dict[str, object] = {
        "file": "m.engine",
        "sha256": "0" * 64,
        "bytes": 0,
        "backend": "null",
        "precision": "fp32",
        "inputs": {"x": SPEC},
        "outputs": {"y": SCALED},
    }
    return Component(**{**fields, **changes})  # type: ignore[arg-type]


def test_parsing() -> None:
    assert parse_ranges("512") == (Range(512, 512, 512),)
    assert parse_ranges("512, 768") == (Range.of(512), Range.of(768))
    assert parse_ranges("256:512:768,64") == (Range(256, 512, 768), Range.of(64))
    assert ",".join(map(str, parse_ranges("256:512:768,64"))) == "256:512:768,64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sizes are N"),
        ("512,", "sizes are N"),
        ("512:768", "MIN:OPT:MAX"),
        ("-64", "sizes are N"),
        ("512.0", "sizes are N"),
        ("٥١٢", "sizes are N"),
        ("0", "from 1 up"),
        ("768:512:256", "ascending order"),
        ("99999999999999999999", "at most 16384"),
        ("16385", "at most 16384"),
    ],
)
def test_refuses_text_that_is_not_a_size(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_ranges(text)


def test_every_combination_is_a_shape() -> None:
    sizes = Sizes(height=parse_ranges("512,768"), width=parse_ranges("512:512:768"))
    shapes = sizes.shapes(["batch", "latent_height", "latent_width"], 8)
    wide = Range(64, 64, 96)
    assert shapes == (
        {"latent_height": Range.of(64), "latent_width": wide},
        {"latent_height": Range.of(96), "latent_width": wide},
    )
    assert sizes.shapes(["rows"], 8) == ()
    assert sizes.shapes(["rows"], 8, Range(1, 2, 3)) == ({"rows": Range(1, 2, 3)},)
    assert sizes.shapes(["height", "batch"], 8)[1] == {"height": Range.of(768)}
    assert sizes.asdict() == {"height": "512,768", "width": "512:512:768"}


def test_the_nearest_fitting_shapes_are_chosen() -> None:
    shapes = [
        {"batch": Range.of(1), "h": Range(32, 64, 128)},
        {"batch": Range.of(1), "h": Range.of(64)},
        {"batch": Range(1, 2, 4), "h": Range.of(96)},
    ]
    assert nearest([], {"batch": 7}) is None
    assert nearest(shapes, {"batch": 1, "h": 64}) == 1
    assert nearest(shapes, {"batch": 1, "h": 96}) == 2
    assert nearest(shapes, {"batch": 1, "h": 97}) == 0
    with pytest.raises(
        ShapeError,
        match="not built for batch 2, h 64; they take batch 1, h 32:64:128 or",
    ):
        nearest(shapes, {"batch": 2, "h": 64})


def test_the_bounding_range_contains_all_shapes() -> None:
    shapes = [{"h": Range(32, 64, 64)}, {"h": Range.of(96)}, {"h": Range(16, 16, 80)}]
    assert bounding_range(shapes) == {"h": Range(16, 64, 96)}
    assert bounding_range([]) == {}


def test_a_size_fixed_in_all_shapes_becomes_a_number() -> None:
    one = component().specialize(({"batch": Range.of(2), "latent_height": Range.of(8)},))
    assert one.inputs["x"].shape == (2, 4, 8, "latent_width")
    assert one.outputs["y"].shape == (2, 3, 64, "latent_width*8")
    assert one.shapes == () and one.free_dimensions == ("latent_width",)
    two = component().specialize(
        (
            {"batch": Range.of(2), "latent_height": Range.of(8)},
            {"batch": Range.of(2), "latent_height": Range.of(16)},
        )
    )
    assert two.inputs["x"].shape == (2, 4, "latent_height", "latent_width")
    assert format_shapes(two.shapes) == "latent_height 8 or latent_height 16"
    with pytest.raises(ShapeError, match="dimension depth is not free"):
        component().specialize(({"depth": Range.of(1)},))


def test_a_run_fits_one_of_the_shapes() -> None:
    made = component().specialize(({"batch": Range.of(1)}, {"batch": Range.of(3)}))
    feeds = {"x": np.zeros((3, 4, 5, 6), np.float32)}
    assert made.fit(feeds) == ({"batch": 3, "latent_height": 5, "latent_width": 6}, 1)
    with pytest.raises(ShapeError, match="take batch 1 or batch 3"):
        made.fit({"x": np.zeros((2, 4, 5, 6), np.float32)})


class Counting:
    """Session that records the number of rows of each run."""

    def __init__(self, made: Component) -> None:
        self.made = made
        self.rows: list[int] = []

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        self.made.fit(feeds)
        self.rows.append(len(feeds["x"]))
        return {"y": np.asarray(feeds["x"])}

    def layers(self) -> list[object]:
        return []

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("batches", "max_rows", "rows", "runs"),
    [
        ("1,2", None, 5, [2, 2, 1]),
        ("1,2", 1, 3, [1, 1, 1]),
        ("2,4", None, 7, [4, 2, 2]),
        ("2", None, 3, [2, 2]),
        ("2", 1, 2, [2]),
        ("1:2:3", None, 7, [3, 3, 1]),
        ("2:3:3", None, 1, [2]),
        ("", None, 7, [7]),
        ("", 3, 7, [3, 3, 1]),
    ],
)
def test_rows_run_in_parts_that_the_engine_supports(
    batches: str, max_rows: int | None, rows: int, runs: list[int]
) -> None:
    sizes = Sizes(batch=parse_ranges(batches) if batches else ())
    made = component().specialize(sizes.shapes(["batch"], 8))
    session = Counting(made)
    engine = Engine("denoiser", made, session, max_rows=max_rows)  # type: ignore[arg-type]
    x = np.arange(rows, dtype=np.float32).reshape(rows, 1, 1, 1) * np.ones((1, 4, 2, 2), np.float32)
    assert (engine.run({"x": x})["y"] == x).all()
    assert session.rows == runs


def test_parts_have_the_rows_of_the_shapes_that_contain_the_size() -> None:
    made = component().specialize(
        (
            {"batch": Range.of(1), "latent_height": Range.of(96)},
            {"batch": Range(1, 2, 4), "latent_height": Range.of(64)},
        )
    )
    for height, runs in ((96, [1, 1, 1]), (64, [3])):
        session = Counting(made)
        Engine("denoiser", made, session).run(  # type: ignore[arg-type]
            {"x": np.zeros((3, 4, height, 1), np.float32)}
        )
        assert session.rows == runs


def test_an_array_of_one_run_is_passed_on_unchanged() -> None:
    """Backends recognize an array that they have uploaded by its identity."""
    made = component()

    class Keeping(Counting):
        def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
            self.x = feeds["x"]
            return super().run(feeds)

    session = Keeping(made)
    engine = Engine("denoiser", made, session)  # type: ignore[arg-type]
    rows = engine.prepared({"x": np.zeros((2, 4, 2, 2))})
    assert rows["x"].dtype == np.float32 and not rows["x"].flags.writeable
    engine.run(rows)
    assert session.x is rows["x"]


def test_a_manifest_refuses_invalid_shapes(handmade) -> None:  # type: ignore[no-untyped-def]
    directory = handmade()
    path = directory / "manifest.json"
    text = path.read_text()
    for bad, message in (
        ('[{"depth": [1, 2, 3]}]', "depth, which is not a free dimension"),
        ('[{"batch": [3, 2, 1]}]', "ascending order"),
        ('[{"batch": [1, 2]}]', "length 3"),
        ("[{}]", "nothing, which is not a free dimension"),
    ):
        path.write_text(text.replace('"shapes": []', f'"shapes": {bad}', 1))
        with pytest.raises(ManifestError, match=message):
            Manifest.read(directory)


def test_image_sizes_in_pixels() -> None:
    from latentforge.runtime.manifest import Latent

    latent = Latent(channels=4, scaling_factor=1.0, downscale=8, multiple=1)
    unet = component(inputs={"sample": SPEC})
    assert latent.image_sizes(unet) == []
    sizes = Sizes(height=parse_ranges("512,768"), batch=parse_ranges("1,2"))
    built = unet.specialize(sizes.shapes(unet.free_dimensions, 8))
    assert latent.image_sizes(built) == [(Range.of(512), ANY), (Range.of(768), ANY)]
    assert str(ANY) == "any"
