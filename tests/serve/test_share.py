"""Shared images: random names, bounded size, expiry, and nothing but what was shared."""

import asyncio
import html
import io
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from PIL import Image
from served import Served, served

from latentforge.runtime.errors import SettingsError
from latentforge.serve.errors import KeyRequiredError
from latentforge.serve.http.app import create_app
from latentforge.serve.http.context import Context
from latentforge.serve.service import ModelSource, Service
from latentforge.serve.share import Caption, ShareFullError, ShareStore

NOW = 1_800_000_000.0
CAPTION = Caption(prompt="<b>owl</b>", model="demo", seed=7, width=64, height=64)


@pytest.fixture
def store(tmp_path: Path) -> ShareStore:
    return ShareStore(directory=tmp_path / "shares", lifetime=100.0, limit=5000)


def files(store: ShareStore, suffix: str) -> list[Path]:
    return sorted(store.directory.glob(f"*{suffix}"))


def test_image_is_found_until_it_expires(store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, NOW)
    assert store.get(image.id, NOW + 99) == image
    assert store.content(image) == b"picture"
    assert store.get(image.id, NOW + 100) is None


def test_image_lies_once_under_names_that_do_not_repeat(store: ShareStore) -> None:
    shares = [store.add(b"picture", CAPTION, NOW + i) for i in range(3)]
    assert len(files(store, ".png")) == 1
    assert len({image.id for image in shares}) == 3
    assert all(len(image.id) == 32 and image.id not in image.digest for image in shares)


def test_content_lives_as_long_as_its_last_share(store: ShareStore) -> None:
    first, last = (store.add(b"picture", CAPTION, NOW + i) for i in (0, 50))
    store.expire(NOW + 120)
    assert store.get(first.id, NOW + 120) is None
    assert store.content(last) == b"picture"
    store.expire(NOW + 150)
    assert not files(store, ".png") and not files(store, ".json")


def test_server_begins_without_what_expired(store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, NOW)
    later = ShareStore.open(store.directory, NOW + 50)
    assert later.get(image.id, NOW + 50) == image
    ShareStore.open(store.directory, NOW + 100)
    assert not files(store, ".png")


def test_folder_that_cannot_be_made_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="--no-shares"):
        ShareStore.open(tmp_path / "file" / "shares", NOW)


def test_another_server_and_a_later_one_have_the_same_images(store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, NOW)
    other = ShareStore(directory=store.directory, lifetime=100.0)
    assert other.get(image.id, NOW) == image
    assert other.content(image) == b"picture"


def test_full_folder_refuses_and_keeps_what_it_promised(store: ShareStore) -> None:
    kept = store.add(bytes(3000), CAPTION, NOW)
    with pytest.raises(ShareFullError, match=r"next one expires in 60 s") as caught:
        store.add(bytes([1]) * 3000, CAPTION, NOW + 40)
    assert caught.value.retry_after == 60
    assert store.content(kept) == bytes(3000)
    assert store.add(bytes([1]) * 3000, CAPTION, NOW + 100)


def test_refused_image_leaves_nothing(store: ShareStore) -> None:
    with pytest.raises(ShareFullError):
        store.add(bytes(6000), CAPTION, NOW)
    assert not files(store, ".png") and not files(store, ".json")


@pytest.mark.parametrize(
    "name",
    ["", "..", "../secret", "a" * 31, "A" * 32, "a" * 32 + "\n", "/etc/passwd", "\x00" * 32],
)
def test_names_that_are_none_reach_no_file(store: ShareStore, name: str) -> None:
    store.add(b"picture", CAPTION, NOW)
    (store.directory.parent / "secret.json").write_text("{}")
    assert store.get(name, NOW) is None


def test_damaged_files_are_no_images(store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, NOW)
    files(store, ".png")[0].write_bytes(b"another")
    assert store.content(image) is None
    files(store, ".json")[0].write_bytes(b'{"id": 1}')
    assert store.get(image.id, NOW) is None


def test_record_under_another_name_is_none(store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, NOW)
    name = "0" * 32
    os.link(store.directory / f"{image.id}.json", store.directory / f"{name}.json")
    assert store.get(name, NOW) is None


def test_folder_is_its_owners_alone(store: ShareStore) -> None:
    store.add(b"picture", CAPTION, NOW)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


def test_threads_share_a_store(store: ShareStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: store.add(b"%d" % (i % 3), CAPTION, NOW), range(12)))
    assert [store.content(image) for image in images] == [b"%d" % (i % 3) for i in range(12)]
    assert len(files(store, ".png")) == 3


def context_of(engines: Path, store: ShareStore) -> Context:
    service = Service([ModelSource(name="handmade", directory=engines)])
    return Context(service=service, metrics=service.metrics, shares=store)


Get = Callable[[str], httpx.Response]


@pytest.fixture
def get(null_engines: Path, store: ShareStore) -> Get:
    """A function that reads an address of a server, which needs no worker for it."""

    async def answer(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(context_of(null_engines, store)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path)

    return lambda path: asyncio.run(answer(path))


def test_page_of_an_image_escapes_its_texts(get: Get, store: ShareStore) -> None:
    hostile = "<script>alert(1)</script> \"'& ${id} \u202e"
    caption = msgspec.structs.replace(CAPTION, prompt=hostile, model='"><img src=x>')
    image = store.add(b"picture", caption, time.time())
    answer = get(f"/s/{image.id}")
    assert answer.status_code == 200
    assert "<script" not in answer.text and "<img src=x" not in answer.text
    assert answer.text.count(html.escape(hostile)) == 4
    assert answer.headers["cache-control"] == "no-store"
    assert "noindex" in answer.headers["x-robots-tag"]
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_file_of_an_image_is_a_picture_and_nothing_else(get: Get, store: ShareStore) -> None:
    image = store.add(b"<html>", CAPTION, time.time())
    answer = get(f"/s/{image.id}.png")
    assert answer.content == b"<html>"
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert 0 < int(answer.headers["cache-control"].split("max-age=")[1].split(",")[0]) <= 100


@pytest.mark.parametrize("name", ["0" * 32, "%2e%2e%2fsecret", "a.png", "A" * 32, ""])
def test_links_that_lead_nowhere_say_so(get: Get, store: ShareStore, name: str) -> None:
    store.directory.mkdir()
    assert get(f"/s/{name}").status_code == 404
    assert get(f"/s/{name}.png").status_code == 404


def test_expired_image_is_gone(get: Get, store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, time.time() - 101)
    assert "leads to no image" in get(f"/s/{image.id}").text
    assert get(f"/s/{image.id}.png").status_code == 404


def test_there_is_no_list(get: Get, store: ShareStore) -> None:
    image = store.add(b"picture", CAPTION, time.time())
    for path in ("/s", "/s/", "/v1/shares", f"/s/{image.digest}", f"/s/{image.digest}.png"):
        assert get(path).status_code in (404, 405)


def owner_of(key: str | None) -> str:
    if key not in ("ann", "bob"):
        raise KeyRequiredError("no key")
    return key


@pytest.fixture(scope="module")
def running(null_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server") / "shares"
    shares = ShareStore(directory=folder, lifetime=100.0, limit=5000)
    with served(lambda: context_of(null_engines, shares), authenticate=owner_of) as found:
        yield found


@pytest.fixture
def server(running: Served) -> Iterator[Served]:
    """A server without shared images."""
    yield running
    directory = shares_of(running).directory
    if directory.is_file():
        directory.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def shares_of(server: Served) -> ShareStore:
    assert server.context.shares is not None
    return server.context.shares


def finished(client: httpx.Client) -> str:
    job = client.post("/v1/jobs", json={"prompt": "red owl", "size": "16x16", "seed": 5}).json()
    while client.get(f"/v1/jobs/{job['id']}").json()["status"] != "completed":
        time.sleep(0.01)
    return str(job["id"])


def test_finished_image_is_shared_with_whoever_has_the_link(server: Served) -> None:
    with server.client(headers={"Authorization": "Bearer ann"}) as ann, server.client() as any_one:
        body = {"job": finished(ann), "index": 0}
        answer = ann.post("/v1/shares", json=body)
        assert answer.status_code == 201
        assert answer.headers["location"] == answer.json()["url"]
        with Image.open(io.BytesIO(any_one.get(answer.json()["image_url"]).content)) as image:
            assert (image.size, image.format) == ((16, 16), "PNG")
        assert "red owl" in any_one.get(answer.json()["url"]).text
        assert any_one.post("/v1/shares", json=body).status_code == 401


@pytest.mark.parametrize(
    ("key", "change", "status", "param"),
    [
        ("ann", {"index": 1}, 409, "index"),
        ("ann", {"index": -1}, 400, "index"),
        ("ann", {"job": "../../etc/passwd"}, 404, None),
        ("ann", {"url": "file:///etc/passwd"}, 400, "url"),
        ("bob", {}, 404, None),
    ],
)
def test_nothing_but_a_clients_own_images_is_shared(
    server: Served, key: str, change: dict[str, Any], status: int, param: str
) -> None:
    with server.client(headers={"Authorization": "Bearer ann"}) as ann:
        body = {"job": finished(ann), **change}
        answer = ann.post("/v1/shares", json=body, headers={"Authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert not shares_of(server).directory.exists()


def test_full_folder_answers_when_to_come_back(server: Served) -> None:
    shares_of(server).add(bytes(4500), CAPTION, time.time())
    with server.client(headers={"Authorization": "Bearer ann"}) as ann:
        answer = ann.post("/v1/shares", json={"job": finished(ann)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shares_full")
    assert 90 < int(answer.headers["retry-after"]) <= 100


def test_folder_that_cannot_be_written_is_no_secret(server: Served) -> None:
    directory = shares_of(server).directory
    directory.write_text("a file")
    with server.client(headers={"Authorization": "Bearer ann"}) as ann:
        answer = ann.post("/v1/shares", json={"job": finished(ann)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shares_full")
    assert str(directory) not in answer.text
