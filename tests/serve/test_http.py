"""HTTP interface on real sockets: what clients send, and what they get back."""

import base64
import io
import json
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from served import Served, complete_engines, served

from latentforge.runtime.denoising.initial_latents import InitImage
from latentforge.runtime.loader import load
from latentforge.serve.errors import KeyRequiredError, job_error
from latentforge.serve.http.app import all_endpoints
from latentforge.serve.http.body import BodyLimits, BodyMemory
from latentforge.serve.http.connection import BoundedConnection, find_lost_peers
from latentforge.serve.http.context import Context, HttpOptions
from latentforge.serve.keys import ApiKey, KeyRing, digest_of
from latentforge.serve.pictures import PictureLimits
from latentforge.serve.request import ImageRequest
from latentforge.serve.scheduler import Limits
from latentforge.serve.service import ModelSource, Service, ServiceOptions

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning:(openai|webuiapi|httpx).*")

GENERATIONS = "/v1/images/generations"
LONG = {"prompt": "a", "num_inference_steps": 500, "n": 10, "size": "512x512"}


def limits(memory: BodyMemory | None) -> HttpOptions:
    shared = memory if memory is not None else BodyMemory()
    return HttpOptions(
        body=BodyLimits(bytes=1 << 20, chunk_seconds=0.5, seconds=1.0, memory=shared),
        pictures=PictureLimits(side=512, pixels=1 << 16),
        deadline=1e6,
    )


def context_of(directory: Path, memory: BodyMemory | None = None) -> Context:
    source = ModelSource(name="handmade", directory=directory)
    service = Service([source], options=ServiceOptions(limits=Limits(queue_seconds=86_400.0)))
    return Context(service=service, metrics=service.metrics, options=limits(memory))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_engines(tmp_path_factory.mktemp("http"))


@pytest.fixture(scope="module")
def server(engines: Path) -> Iterator[Served]:
    """A server; whatever the tests do to it, every accepted request must end."""
    with served(lambda: context_of(engines)) as found:
        yield found
        scheduler = found.context.service.scheduler
        wait_for(lambda: not scheduler.jobs)
        assert (scheduler.waiting, scheduler.running, scheduler.permits) == (0, 0, 0)
        wait_for(lambda: not found.value("latentforge_open_streams"))


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def encoded(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def png(width: int = 48, height: int = 32, *, hole: bool = False) -> bytes:
    """Return a picture, opaque or with a transparent corner."""
    pixels = np.full((height, width, 4), 200, np.uint8)
    pixels[..., 3] = 255
    if hole:
        pixels[:8, :8, 3] = 0
    return encoded(pixels)


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error, after a check of its envelope."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return dict(error)


def events_of(answer: httpx.Response) -> list[tuple[str, Any]]:
    found = []
    for block in answer.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


# OpenAI


def test_images_have_consecutive_seeds_and_their_settings(client: httpx.Client) -> None:
    body = {"prompt": "a red apple", "n": 2, "seed": 7, "size": "32x48"}
    answer = client.post(GENERATIONS, json=body).raise_for_status().json()
    assert [image["seed"] for image in answer["data"]] == [7, 8]
    assert answer["size"] == "32x48" and answer["output_format"] == "png"
    second = Image.open(io.BytesIO(base64.b64decode(answer["data"][1]["b64_json"])))
    assert second.size == (32, 48)
    stored = json.loads(second.info["latentforge"])
    assert (stored["seed"], stored["prompts"], stored["model"]) == (8, ["a red apple"], "handmade")
    alone = client.post(GENERATIONS, json={**body, "n": 1, "seed": 8}).json()
    assert alone["data"][0]["b64_json"] == answer["data"][1]["b64_json"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"n": 11}, "n"),
        ({"n": 1.5}, "n"),
        ({"size": "32"}, "size"),
        ({"size": "33x32"}, "size"),
        ({"size": "99999x32"}, "size"),
        ({"model": "other"}, "model"),
        ({"quality": "hd"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"moderation": "high"}, "moderation"),
        ({"complexity": "low"}, "complexity"),
        ({"sampler": "best"}, "sampler"),
        ({"sampler": "edm_euler"}, "sampler"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 70}, "seed"),
        ({"strength": 0.5}, "strength"),
        ({"timeout": 0}, "timeout"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"prompt": "x" * 20_000}, "prompt"),
    ],
)
def test_wrong_fields_are_named(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = client.post(GENERATIONS, json={"prompt": "a red apple", **change})
    assert answer.status_code == (404 if param == "model" else 400)
    error = error_of(answer)
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", "", 415),
        (b"x" * (20 << 20), "application/json", 413),
    ],
)
def test_bodies_that_are_no_requests(
    client: httpx.Client, content: bytes, kind: str, status: int
) -> None:
    answer = client.post(GENERATIONS, content=content, headers={"content-type": kind})
    assert answer.status_code == status
    error_of(answer)


def test_addresses_of_images_need_no_key_and_are_signed(client: httpx.Client) -> None:
    body = {"prompt": "a", "response_format": "url", "output_format": "webp", "seed": 1}
    url = client.post(GENERATIONS, json=body).json()["data"][0]["url"]
    image = client.get(url)
    assert image.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(image.content)).format == "WEBP"
    assert client.get(url.replace("signature=", "signature=0")).status_code == 403
    assert client.get(url.replace("/0.webp", "/1.webp")).status_code == 403
    assert client.get(url.partition("?")[0]).status_code == 400


def request_of(server: Served, answer: Any) -> ImageRequest:
    """Return the request that the server made of what a client sent."""
    return server.context.service.get(answer.headers["x-job-id"]).request


def test_edits_take_a_picture_and_a_mask(server: Served, client: httpx.Client) -> None:
    form = {"prompt": "a red apple", "n": "2", "seed": "3", "stream": "false"}
    files = {"image": ("a.png", png()), "mask": ("b.png", png(hole=True))}
    answer = client.post("/v1/images/edits", data=form, files=files).raise_for_status()
    body = answer.json()
    assert [image["seed"] for image in body["data"]] == [3, 4] and body["size"] == "48x32"
    ran = request_of(server, answer)
    assert ran.image is not None and ran.mask is not None
    assert ran.image.shape == (32, 48, 3) and ran.settings.strength == 1
    assert (ran.mask == 255).sum() == 64 and ran.mask[0, 0] == 255


@pytest.mark.parametrize(("hole", "strength"), [(False, 0.8), (True, 1.0)])
def test_edits_without_a_mask_paint_the_holes_or_change_all(
    server: Served, client: httpx.Client, hole: bool, strength: float
) -> None:
    files = {"image[]": ("a.png", png(hole=hole))}
    answer = client.post("/v1/images/edits", data={"prompt": "a"}, files=files)
    ran = request_of(server, answer.raise_for_status())
    assert (ran.mask is not None) is hole and ran.settings.strength == strength


@pytest.mark.parametrize(
    ("files", "form", "status", "param"),
    [
        ({}, {}, 415, None),
        ({"mask": png(hole=True)}, {}, 400, "image"),
        ({"image": b"no picture"}, {}, 400, "image"),
        ({"image": png(), "mask": png()}, {}, 400, "mask"),
        ({"image": png(), "mask": png(64, 64, hole=True)}, {}, 400, "mask"),
        ({"image": png(600, 16)}, {}, 413, "image"),
        ({"image": png(), "other": png()}, {}, 400, "other"),
        ({"image": png()}, {"n": "many"}, 400, "n"),
        ({"image": png()}, {"input_fidelity": "high"}, 400, "input_fidelity"),
        ({"image": png(8, 8)}, {}, 400, "image"),
        ({"image": png()}, {"size": "40x40"}, 400, "size"),
        ({"image": b"x" * (2 << 20)}, {}, 413, None),
    ],
)
def test_edits_that_are_wrong(
    client: httpx.Client, files: Any, form: dict[str, str], status: int, param: str | None
) -> None:
    sent = {name: (f"{name}.png", content) for name, content in files.items()}
    answer = client.post("/v1/images/edits", data={"prompt": "a", **form}, files=sent)
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)


@pytest.mark.parametrize(
    ("form", "kind", "word"),
    [
        (b"", "multipart/form-data; boundary=B", "early"),
        (b"--B\r\n", "multipart/form-data; boundary=B", "early"),
        (b"--B--\r\n", "multipart/form-data", "boundary"),
        (b"--B\r\n\r\na\r\n--B--\r\n", "multipart/form-data; boundary=B", "name"),
        (b"x", "multipart/form-data; boundary=B", "read"),
        (b"--B--\r\n", f"multipart/form-data; boundary={'B' * 300}", "read"),
    ],
)
def test_what_is_no_form(client: httpx.Client, form: bytes, kind: str, word: str) -> None:
    answer = client.post("/v1/images/edits", content=form, headers={"content-type": kind})
    assert answer.status_code == 400 and word in error_of(answer)["message"]


def test_a_form_has_few_parts(client: httpx.Client) -> None:
    files = {f"f{index}": (f"{index}", b"") for index in range(40)}
    answer = client.post("/v1/images/edits", data={"prompt": "a"}, files=files)
    assert answer.status_code == 400 and "parts" in error_of(answer)["message"]


def test_damaged_forms_are_no_errors_of_the_server(client: httpx.Client) -> None:
    chance = random.Random(5)
    kind = {"content-type": "multipart/form-data; boundary=B"}
    texts = part("prompt", "a") + part("n", "1")
    whole = f"{texts}--B\r\n".encode() + IMAGE_HEAD + png(hole=True) + b"\r\n--B--\r\n"
    statuses = set()
    for _ in range(200):
        sent = bytearray(whole)
        for _ in range(chance.choice([1, 2, 5, 20])):
            place = chance.randrange(len(sent))
            sent[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        answer = client.post("/v1/images/edits", content=bytes(sent), headers=kind)
        statuses.add(answer.status_code)
    assert statuses <= {200, 400, 413} and 400 in statuses


IMAGE_HEAD = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


def part(name: str, text: str) -> str:
    return f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'


def test_images_larger_than_the_server_makes(server: Served, client: httpx.Client) -> None:
    most = client.get("/v1/capabilities").json()["limits"]["image_pixels"]
    assert most == 2048 * 2048
    for path in (GENERATIONS, "/v1/jobs"):
        answer = client.post(path, json={"prompt": "a", "size": "2048x2056"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "width": 8192, "height": 8192})
    assert answer.status_code == 400 and "4,194,304 pixels" in answer.text


def test_pictures_wait_in_the_size_of_the_images(server: Served, client: httpx.Client) -> None:
    """They become the same pixels as in the runtime, which gets them as they are."""
    pixels = np.random.default_rng(1).integers(0, 256, (61, 95, 3), np.uint8)
    hole = np.where(pixels[..., :1] > 99, 255, 0).astype(np.uint8)
    files = [("image", pixels), ("mask", np.concatenate([pixels, hole], -1))]
    sent = {name: (name, encoded(array)) for name, array in files}
    form = {"prompt": "a", "size": "48x32"}
    answer = client.post("/v1/images/edits", data=form, files=sent).raise_for_status()
    ran = request_of(server, answer)
    assert ran.image is not None and ran.mask is not None
    assert ran.image.shape == (32, 48, 3) and ran.mask.shape == (32, 48)
    mask = np.where(hole[..., 0] == 0, 255, 0).astype(np.uint8)
    latent = server.context.service.models["handmade"].manifest.latent
    late, early = (
        InitImage.of(image, marked, ran.settings, latent)
        for image, marked in ((pixels, mask), (ran.image, ran.mask))
    )
    assert np.array_equal(late.pixels, early.pixels) and np.array_equal(late.mask, early.mask)


def test_bodies_share_their_memory(engines: Path) -> None:
    with served(lambda: context_of(engines, BodyMemory(1 << 16)), start=False) as server:
        with server.client() as client:
            busy = client.post(GENERATIONS, json={"prompt": "a" * (1 << 17)})
            assert busy.status_code == 503 and error_of(busy)["code"] == "busy"
            wrong = client.post(GENERATIONS, json={"prompt": 1, "user": "a" * (1 << 15)})
            assert wrong.status_code == 400
        assert server.context.options.body.memory.held == 0


def test_streams_send_images_as_events(client: httpx.Client) -> None:
    body = {"prompt": "a", "n": 2, "seed": 3, "stream": True}
    answer = client.post(GENERATIONS, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    events = events_of(answer)
    assert [name for name, _ in events] == ["image_generation.completed"] * 2
    assert [data["seed"] for _, data in events] == [3, 4]


LONG_TEXT = {"prompt": "a " * 6 + "red apple", "negative_prompt": "red " * 6 + "owl"}
"""Texts of eight words, of which the text encoder reads six."""


def test_what_the_model_did_not_read_is_told(client: httpx.Client) -> None:
    """In each API's answers and events, with the field's name, and once."""
    answer = client.post(GENERATIONS, json={**LONG_TEXT, "n": 2}).json()
    ends = {"prompt": "did not read: 'red apple'", "negative_prompt": "did not read: 'owl'"}
    told = {part["param"]: part["message"].split(", which ")[1] for part in answer["warnings"]}
    assert told == ends
    ((_, event),) = events_of(client.post(GENERATIONS, json={**LONG_TEXT, "stream": True}))
    assert event["warnings"] == answer["warnings"]
    job = client.post("/v1/jobs", json={**LONG_TEXT, "n": 2}).json()
    events = events_of(client.get(job["events_url"]))
    (warning,) = [data for name, data in events if name == "warning"]
    assert warning["warnings"] == answer["warnings"] == events[-1][1]["warnings"]
    assert client.get(job["poll_url"]).json()["warnings"] == answer["warnings"]
    web = client.post("/sdapi/v1/txt2img", json=LONG_TEXT).json()
    assert [text.partition(": ")[0] for text in json.loads(web["info"])["warnings"]] == [*ends]


def test_texts_that_fit_have_no_warning(client: httpx.Client) -> None:
    fits = {"prompt": "a " * 6, "negative_prompt": "red"}
    assert client.post(GENERATIONS, json=fits).json()["warnings"] == []
    web = client.post("/sdapi/v1/txt2img", json=fits).json()
    assert json.loads(web["info"])["warnings"] == []


def test_models_are_listed(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{model['id']}").json() == model
    assert error_of(client.get("/v1/models/other"))["code"] == "model_not_found"


# jobs


def test_a_job_is_accepted_and_followed(client: httpx.Client) -> None:
    accepted = client.post("/v1/jobs", json={"prompt": "a red apple", "seed": 5, "n": 2})
    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["location"] == job["poll_url"]
    events = events_of(client.get(job["events_url"]))
    names = [name for name, _ in events]
    assert names.count("image") == 2 and names[-1] == "completed" and "started" in names
    fractions = [data["fraction"] for name, data in events if name == "progress"]
    assert fractions == sorted(fractions)
    ended = events[-1][1]
    assert ended == client.get(job["poll_url"]).json()
    assert ended["status"] == "completed" and ended["seeds"] == [5, 6]
    content = client.get(ended["images"][1]["url"]).content
    assert json.loads(Image.open(io.BytesIO(content)).info["latentforge"])["seed"] == 6


def test_clients_do_not_repeat_what_was_cancelled() -> None:
    status = job_error("cancelled", "by another request").status
    assert 400 <= status < 500 and status not in (408, 409, 429)  # which OpenAI's client repeats


def test_a_job_has_a_depth_map(tmp_path: Path, client: httpx.Client) -> None:
    """Of 16 bits, where the model takes one; elsewhere it is refused."""
    pytest.importorskip("onnxruntime")
    from test_service import depth_engines

    directory, file = depth_engines(tmp_path), io.BytesIO()
    depth = Image.fromarray(np.arange(1000, 1000 + 32 * 48, dtype=np.uint16).reshape(32, 48))
    depth.save(file, "PNG")
    body = {"prompt": "a", "seed": 1, "image": text64(png()), "depth_map": text64(file.getvalue())}
    refused = client.post("/v1/jobs", json=body)
    assert refused.status_code == 400 and error_of(refused)["param"] == "depth_map"
    with served(lambda: context_of(directory)) as server, server.client() as deep:
        (model,) = deep.get("/v1/capabilities").json()["models"]
        assert model["depth_map"] and model["tasks"] == ["image_to_image"]
        for path in ("/v1/jobs", GENERATIONS, "/sdapi/v1/txt2img"):
            missing = deep.post(path, json={"prompt": "a"})
            assert missing.status_code == 400 and error_of(missing)["param"] == "depth_map"
        flat = deep.post("/v1/jobs", json={**body, "depth_map": body["image"]})
        assert flat.status_code == 400 and error_of(flat)["param"] == "depth_map"
        job = deep.post("/v1/jobs", json=body).raise_for_status().json()
        _, ended = events_of(deep.get(job["events_url"]))[-1]
        made = deep.get(ended["images"][0]["url"]).content
    with load(directory) as pipe:
        image = Image.open(io.BytesIO(png()))
        expected = pipe("a", seed=1, image=image, depth_map=depth).images[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made))), np.asarray(expected))


def test_a_job_is_cancelled_once(client: httpx.Client) -> None:
    job = client.post("/v1/jobs", json=LONG).json()
    for _ in range(2):
        assert client.post(job["cancel_url"]).status_code == 200
    assert client.get(job["poll_url"]).json()["status"] == "cancelled"
    assert client.post("/v1/jobs/none/cancel").status_code == 404
    events = events_of(client.get(job["events_url"]))
    assert events[-1][0] == "cancelled" and events[-1][1]["error"]["code"] == "cancelled"


def test_previews_come_with_events(client: httpx.Client) -> None:
    long = {"prompt": "a", "num_inference_steps": 300}
    job = client.post("/v1/jobs", json={**long, "previews": 20}).json()
    progress = [d for name, d in events_of(client.get(job["events_url"])) if name == "progress"]
    pictures = [p["b64_jpeg"] for data in progress for p in data["previews"]]
    assert pictures and Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (6, 4)
    body = {**long, "stream": True, "partial_images": 1}
    (name, partial), (last, _) = events_of(client.post(GENERATIONS, json=body))
    assert (name, last) == ("image_generation.partial_image", "image_generation.completed")
    assert partial["partial_image_index"] == 0
    assert Image.open(io.BytesIO(base64.b64decode(partial["b64_json"]))).size == (48, 32)


def test_a_request_that_is_repeated_is_one_job(client: httpx.Client) -> None:
    headers = {"idempotency-key": "k-1"}
    first, second = (
        client.post(GENERATIONS, json={"prompt": "a"}, headers=headers) for _ in range(2)
    )
    assert first.json() == second.json()
    assert first.headers["x-job-id"] == second.headers["x-job-id"]
    other = client.post(GENERATIONS, json={"prompt": "b"}, headers=headers)
    assert other.status_code == 422 and error_of(other)["code"] == "idempotency_key_reused"
    bad = client.post(GENERATIONS, json={"prompt": "b"}, headers={"idempotency-key": "a b"})
    assert bad.status_code == 400 and error_of(bad)["param"] == "Idempotency-Key"


def test_a_deadline_is_an_error(client: httpx.Client) -> None:
    late = client.post(GENERATIONS, json={**LONG, "timeout": 0.05})
    assert late.status_code == 504 and error_of(late)["code"] == "deadline_exceeded"


# health


def test_health_and_metrics(client: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200
    assert client.get("/v2/models/handmade/ready").json() == {"name": "handmade", "ready": True}
    assert client.get("/v2/models/other/ready").status_code == 404
    client.post(GENERATIONS, json={"prompt": "a secret"})
    text = client.get("/metrics").text
    assert 'route="/v1/images/generations",status="200"' in text and "secret" not in text


def test_readiness_ends_with_draining(engines: Path) -> None:
    with served(lambda: context_of(engines), start=False) as server, server.client() as client:
        server.call(server.context.service.scheduler.drain)
        _check_draining(client)


def _check_draining(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200
    ready = client.get("/readyz")
    assert ready.status_code == 503 and ready.json()["draining"]
    refused = client.post(GENERATIONS, json={"prompt": "a"})
    assert refused.status_code == 503 and error_of(refused)["code"] == "draining"
    assert int(refused.headers["retry-after"]) > 0 and refused.headers["connection"] == "close"


def test_requests_have_ids(client: httpx.Client) -> None:
    assert (
        client.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    made = client.get("/livez", headers={"x-request-id": b"a b\xe9"}).headers["x-request-id"]
    assert made and " " not in made


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/x", 404), ("PUT", "/v1/jobs", 405)]
)
def test_paths_and_methods_that_do_not_exist(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_keys_guard_all_but_health(engines: Path) -> None:
    def authenticate(key: str | None) -> str:
        if key != "right":
            raise KeyRequiredError("send a key")
        return "owner"

    with served(lambda: context_of(engines), authenticate=authenticate, start=False) as server:
        with server.client() as client:
            assert client.get("/livez").status_code == 200
            for endpoint in all_endpoints(server.context):
                path = endpoint.path.format(model="handmade", id="x", file="x")
                answer = client.request(endpoint.method, path)
                assert (answer.status_code == 401) != endpoint.open, endpoint.path
            bearer = {"authorization": "Bearer right"}
            assert client.get("/v1/models", headers=bearer).status_code == 200
            assert client.get("/v1/models", auth=("anyone", "right")).status_code == 200
            wrong = client.get("/v1/models", headers={"authorization": "Bearer wrong"})
            assert error_of(wrong)["code"] == "invalid_api_key"
            assert wrong.headers["www-authenticate"].startswith("Bearer")


def test_limits_of_keys_and_of_the_queue(engines: Path) -> None:
    """Without workers nothing that is accepted ends."""
    keys = {
        "small": ApiKey(sha256=digest_of("s"), rate=1e-6, burst=1e-3),
        "patient": ApiKey(sha256=digest_of("p"), queued=1),
        "full": ApiKey(sha256=digest_of("f")),
    }
    ring, body = KeyRing(keys), {"prompt": "a"}

    def context() -> Context:
        few = ServiceOptions(limits=Limits(queue_jobs=2))
        source = ModelSource(name="handmade", directory=engines)
        service = Service([source], options=few, ring=ring)
        return Context(service=service, metrics=service.metrics)

    with served(context, authenticate=ring.owner, start=False) as server, server.client() as client:

        def post(key: str) -> httpx.Response:
            bearer = {"authorization": f"Bearer {key}"}
            return client.post("/v1/jobs", json=body, headers=bearer)

        answers = [post(key) for key in "sppff"]
        assert [answer.status_code for answer in answers] == [400, 202, 429, 202, 503]
        assert all(int(answers[i].headers["retry-after"]) > 0 for i in (2, 4))
        codes = [error_of(answers[i])["code"] for i in (0, 2, 4)]
        assert codes == ["invalid_value", "rate_limit_exceeded", "queue_full"]
        theirs = client.get(answers[1].json()["poll_url"], headers={"authorization": "Bearer f"})
        assert theirs.status_code == 404


# clients of others


def test_the_openai_client(server: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["handmade"]
    answer = client.images.generate(
        prompt="a red apple", n=2, size="48x32", user="me", extra_body={"seed": 1}
    )
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).size == (48, 32)
    events = list(client.images.generate(prompt="a", stream=True, output_format="jpeg"))
    assert [event.type for event in events] == ["image_generation.completed"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a", quality="hd")
    assert refused.value.param == "quality"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="gpt-image-1")


def test_a_web_ui_client(server: Served) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(port=server.port, host="127.0.0.1", steps=4)
    api.session.trust_env = False
    result = api.txt2img(
        prompt="a red apple", negative_prompt="owl", seed=4, width=48, height=32, batch_size=2
    )
    assert [image.size for image in result.images] == [(48, 32)] * 2
    assert result.info["all_seeds"] == [4, 5] and result.info["sampler_name"] == "euler_ancestral"
    assert result.parameters["steps"] == 4
    assert "Euler a" in api.util_get_sampler_names()
    assert api.util_get_model_names() == ["handmade"] == [api.util_get_current_model()]
    api.util_wait_for_ready()
    with pytest.raises(RuntimeError, match="tiling"):
        api.txt2img(prompt="a", tiling=True)


def test_the_openai_client_edits(server: Served) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.images.with_raw_response.edit(
        image=("a.png", png()), mask=("m.png", png(hole=True)), prompt="a", size="48x32"
    )
    assert len(answer.parse().data) == 1 and request_of(server, answer).mask is not None


def test_a_web_ui_client_starts_from_an_image(server: Served) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(port=server.port, host="127.0.0.1", steps=4, sampler="DDIM")
    api.session.trust_env = False
    answers: list[Any] = []
    api.session.hooks["response"].append(lambda answer, **_: answers.append(answer))
    picture = Image.open(io.BytesIO(png()))
    options = {"images": [picture], "prompt": "a", "width": 48, "height": 32, "eta": 0}
    api.img2img(denoising_strength=0.5, **options)
    assert request_of(server, answers[-1]).settings.strength == 0.5
    mask = {"mask_image": picture, "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    assert len(api.img2img(**mask, **options).images) == 1
    assert request_of(server, answers[-1]).mask is not None
    with pytest.raises(RuntimeError, match="mask_blur"):
        api.img2img(**{**mask, "mask_blur": 4}, **options)


# clients that misbehave


def test_a_client_that_leaves_ends_its_job(server: Served) -> None:
    for stream in (False, True):
        body = json.dumps({**LONG, "stream": stream}).encode()
        cancelled = {"model": "handmade", "end": "cancelled"}
        before = server.value("latentforge_jobs_total", **cancelled)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request_bytes(body))
            wait_for(lambda: server.context.service.scheduler.running)
        wait_for(lambda: not server.context.service.scheduler.permits)
        assert (
            server.value("latentforge_jobs_total", model="handmade", end="cancelled") == before + 1
        )


def request_bytes(body: bytes, path: str = GENERATIONS) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def test_a_client_that_leaves_the_queue_ends_its_job(server: Served, client: httpx.Client) -> None:
    first = client.post("/v1/jobs", json=LONG).json()
    scheduler = server.context.service.scheduler
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_bytes(json.dumps({**LONG, "seed": 1}).encode()))
        wait_for(lambda: scheduler.jobs == 2)
    wait_for(lambda: scheduler.jobs == 1)
    assert client.post(first["cancel_url"]).json()["status"] == "cancelled"


def test_a_stream_that_nobody_reads_holds_nothing_up(server: Served, client: httpx.Client) -> None:
    job = client.post("/v1/jobs", json={**LONG, "previews": 100}).json()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        path = f"/v1/jobs/{job['id']}/events"
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        seen = [client.get(job["poll_url"]).json()["progress"]["step"]]
        wait_for(lambda: client.get(job["poll_url"]).json()["progress"]["step"] > seen[0] + 2)
        assert client.post(job["cancel_url"]).json()["status"] == "cancelled"


def test_the_kernel_looks_for_lost_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
            find_lost_peers(connection)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
            connection.close()


def test_what_is_not_http_is_refused(server: Served) -> None:
    start = b"POST /v1/jobs HTTP/1.1\r\nhost: a\r\n"
    for sent in (
        b"\0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
        start + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        start + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        start + b"transfer-encoding: chunked, x\r\n\r\n{}",
        start + b"x : y\r\n\r\n",
        start + b"x: " + b"y" * 100_000,
        start + b"x: y\r\n" * 20_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(sent)
            answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in answer, sent


def test_answers_come_in_one_piece_and_connections_are_kept(server: Served) -> None:
    """A packet each for its head and its body would wake the client twice."""
    short = json.dumps({"prompt": "a", "steps": 1}).encode()
    asked = request_bytes(short, "/nothing")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(asked)
            answer = connection.recv(10_000)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 404 ") and json.loads(body)["error"]
        connection.sendall(asked * 2)  # pipelined: answered in order
        wait_for(lambda: connection.recv(20_000, socket.MSG_PEEK).count(b"HTTP/1.1 404 ") == 2)


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_bodies_that_do_not_arrive(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request_bytes(b"{" * 100)[:-50])
        assert b" 408 " in connection.recv(1000)


class Impatient(BoundedConnection):
    """Connection whose times are short."""

    head_seconds = 0.3
    read_seconds = 0.3


def test_a_thousand_idle_connections_do_not_stop_the_server(engines: Path) -> None:
    """They are closed in time, also those that send their headers byte by byte."""
    with idle_server(engines) as server, server.client() as client:
        count = min(1000, (open_files() - 200) // 2)
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
        for connection in idle[::2]:
            connection.sendall(b"GET /livez HTTP/1.1\r\nx: ")
        start = time.monotonic()
        assert client.get("/livez").status_code == 200
        assert time.monotonic() - start < 2
        for connection in idle:
            assert is_closed(connection)
            connection.close()


def test_one_connection_too_many_is_told_when_to_come_back(engines: Path) -> None:
    """Health is answered all the same: a full server is not to be restarted."""
    with served(lambda: context_of(engines), start=False, connections=3) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        with server.client() as client:
            refused = client.get("/v1/models")
            assert refused.status_code == 503 and error_of(refused)["code"] == "busy"
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
            assert client.get("/livez").status_code == 200
            counted = {"route": "none", "model": "", "status": "503"}
            assert server.value("latentforge_requests_total", **counted) == 1
            for connection in idle:
                connection.close()
            wait_for(lambda: client.get("/v1/models").status_code == 200)


def open_files() -> int:
    """Return the number of files that this process may open, after asking for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def test_a_client_that_does_not_read_is_cut_off(engines: Path) -> None:
    """Others are served meanwhile."""
    with idle_server(engines) as server, server.client() as client:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 300)
            time.sleep(1)
            assert client.get("/livez").status_code == 200
            assert is_closed(connection)


def idle_server(engines: Path) -> Any:
    """Return a server without workers, whose times are short."""
    return served(lambda: context_of(engines), Impatient, start=False)


def is_closed(connection: socket.socket) -> bool:
    """Return True if the server has closed a connection, after reading what is left of it."""
    connection.settimeout(10)
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return True


def test_openapi_describes_every_endpoint(server: Served, client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    described = {(m.upper(), path) for path, item in document["paths"].items() for m in item}
    assert described == {(e.method, e.path) for e in all_endpoints(server.context)}
    body = document["components"]["schemas"]["GenerationBody"]
    assert body["properties"]["n"]["anyOf"][0]["maximum"] == 10
    assert body["additionalProperties"] is False
