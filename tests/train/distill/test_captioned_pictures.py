"""Pictures with captions: folders and shards, their order, and what is refused."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.captioned_pictures import CaptionedPictures


def png(shade: int) -> bytes:
    """Return the file of a small grey picture."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, count: int) -> Path:
    """Write pictures, each with its shade as the caption."""
    folder.mkdir()
    for shade in range(count):
        (folder / f"{shade:03}.png").write_bytes(png(shade))
        (folder / f"{shade:03}.txt").write_text(f"shade {shade}\n")
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write an uncompressed tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int, count: int) -> Path:
    """Write shards whose pictures have consecutive shades."""
    folder.mkdir()
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for shade in range(shard * count, (shard + 1) * count):
            members |= {f"d/{shade}.png": png(shade), f"d/{shade}.txt": f"shade {shade}".encode()}
            members[f"d/{shade}.seg.pickle"] = b"cos\nsystem\n"  # of another library, never read
        write_tar(folder / f"part-{shard:02}.tar", members)
    return folder


def shades(pictures: CaptionedPictures, start: int, count: int) -> list[int]:
    """Return the shades at positions, which are also those of the captions."""
    found = [picture.image().getpixel((0, 0))[0] for picture in pictures.take(start, count)]
    named = [int(picture.caption().split()[1]) for picture in pictures.take(start, count)]
    assert named == found
    return found


def test_every_epoch_has_every_picture_in_another_order(tmp_path: Path) -> None:
    pictures = CaptionedPictures.open(str(write_folder(tmp_path / "data", 12)))
    first, second = shades(pictures, 0, 12), shades(pictures, 12, 12)
    assert len(pictures) == 12 and sorted(first) == sorted(second) == [*range(12)]
    assert first != second and first != [*range(12)]


@pytest.mark.parametrize("place", ["{}", "{}/part-{{00..02}}.tar", "{}/list.txt"])
def test_shards_by_any_name_are_one_set(place: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", shards=3, count=4)
    (folder / "list.txt").write_text("".join(f"part-{n:02}.tar\n" for n in range(3)))
    pictures = CaptionedPictures.open(place.format(folder), seed=1)
    rows = shades(pictures, 0, 12)
    assert sorted(rows) == [*range(12)] and rows != [*range(12)]
    assert rows == shades(CaptionedPictures.open(str(folder), seed=1), 0, 12)


def test_a_position_alone_says_which_picture_it_is(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", shards=3, count=5)
    rows = shades(CaptionedPictures.open(str(folder)), 0, 40)
    for start in (37, 14, 15, 0, 29):  # an opening of its own for each, as after a restart
        assert shades(CaptionedPictures.open(str(folder)), start, 3) == rows[start:][:3]


def test_captions_of_metadata_and_of_json_members(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "a.PNG").write_bytes(png(1))
    row = {"file_name": "more/a.PNG", "text": " a  grey\npicture ", "score": 3}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert CaptionedPictures.open(str(folder))[0].caption() == "a grey picture"
    sample = {"1.jpg": png(1), "1.json": b'{"caption": "from json"}'}
    tar = write_tar(tmp_path / "one.tar", sample)
    assert CaptionedPictures.open(str(tar))[0].caption() == "from json"


@pytest.mark.parametrize("empty", [False, True])
def test_pictures_without_captions_are_counted_and_named(empty: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 4)
    for name in ("002.txt", "003.txt"):
        (folder / name).write_bytes(b"") if empty else (folder / name).unlink()
    with pytest.raises(SettingsError, match=r"2 of 4 pictures in .* the first of them 002\.png"):
        CaptionedPictures.open(str(folder))


def test_shards_without_captions_are_counted_and_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2), "2.txt": b"two"})
    with pytest.raises(SettingsError, match=r"1 of 2 pictures in .* a\.tar/1:"):
        CaptionedPictures.open(str(tar))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    whole = write_tar(tmp_path / "whole.tar", {"1.txt": b"a", "1.png": png(1) * 40})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2048])
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "x"}\n')
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "metadata.jsonl").write_text("[1]\n")
    for place, words in {
        "empty": "has no pictures",
        "missing": "cannot read .*missing: No such file",
        "text.tar": "as an uncompressed tar",
        "cut.tar": "as an uncompressed tar: .*",
        "bad": r"names \.\./x\.png, which is not there",
        "lines": "line 1: expected",
        "x{9..2}.tar": "expected a range",
    }.items():
        with pytest.raises(SettingsError, match=words) as error:
            CaptionedPictures.open(str(tmp_path / place))
        assert "\n" not in str(error.value)


def test_damaged_pictures_and_captions_are_named(tmp_path: Path) -> None:
    members = {"1.png": png(1)[:30], "1.txt": b"\xff", "2.png": png(2), "2.txt": b" \n"}
    pictures = CaptionedPictures.open(str(write_tar(tmp_path / "a.tar", members)))
    first, second = sorted(pictures.take(0, 2), key=lambda picture: picture.name)
    with pytest.raises(SettingsError, match=r"cannot read a\.tar/1 as an image"):
        first.image()
    with pytest.raises(SettingsError, match=r"a\.tar/1 is not UTF-8"):
        first.caption()
    with pytest.raises(SettingsError, match=r"a\.tar/2 has an empty caption"):
        second.caption()


def test_a_shard_that_changes_under_the_training_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", shards=3, count=2)
    pictures = CaptionedPictures.open(str(folder))
    for path in folder.glob("*.tar"):
        write_tar(path, {"1.png": png(1), "1.txt": b"one"})
    with pytest.raises(SettingsError, match="has changed"):
        pictures.take(0, 6)
