"""The page in a real browser, against the server with the demo's engines."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from served import served

from latentforge.serve.errors import KeyRequiredError
from latentforge.serve.http.context import Context
from latentforge.serve.service import ModelSource, Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("the page's tests need chromium: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", exc_type=ImportError)
expect = sync_api.expect

PROMPT = "owl on a pink background"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
SECONDS = 30_000  # milliseconds that anything may take on a loaded machine
LONG = 1000  # steps
RUNNING = re.compile(rf"Step \d+ of {LONG}")


@dataclass
class Site:
    """Server as a process, which can be killed and started again at the same address."""

    engines: Path
    cache: Path
    port: int = field(default_factory=lambda: free_port())
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = f"--port {self.port} --queue-seconds 600 --measure-seconds 0".split()
        command = [sys.executable, "-m", "latentforge", "serve", str(self.engines), *options]
        environment = {**os.environ, "LATENTFORGE_CACHE": str(self.cache)}
        with (self.cache / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while not self.ready():
            assert self.process.poll() is None, (self.cache / "log").read_text()
            assert time.monotonic() < end, (self.cache / "log").read_text()
            time.sleep(0.05)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def site(demo_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(demo_engines, tmp_path_factory.mktemp("cache"))
    found.start()
    yield found
    found.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


Open = Callable[..., Any]


@pytest.fixture
def visit(site: Site, browser: Any) -> Iterator[Open]:
    """A function that opens the page in a browser of its own, where nothing may go wrong."""
    contexts, problems = [], []

    def opened(url: str = site.url, **options: Any) -> Any:
        context, host = browser.new_context(**options), url.split("/")[2]
        context.set_default_timeout(SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: urls.setdefault(host, set()).add(request.url))
        page.goto(url)
        return page

    urls: dict[str, set[str]] = {}
    expect.set_options(timeout=SECONDS)
    yield opened
    for context in contexts:
        context.close()
    # The browser itself reports answers such as 404, and refused connections, as errors.
    assert [text for text in problems if "Failed to load resource" not in text] == []
    assert [url for host, loaded in urls.items() for url in loaded if host not in url] == []


@pytest.fixture
def page(visit: Open) -> Any:
    return visit()


def generate(page: Any, prompt: str = PROMPT, **fields: object) -> None:
    """Send a request: see the form's ids for the fields."""
    expect(page.locator("#generate")).to_be_enabled()
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")


def generate_long(page: Any, prompt: str = PROMPT, **fields: object) -> None:
    """Send a request that takes 15 seconds and more."""
    expect(page.locator("#generate")).to_be_enabled()
    page.select_option("#size", "custom")
    generate(page, prompt, width=128, height=128, steps=LONG, **fields)


def check_accessible(page: Any) -> None:
    found = axe_api.Axe().run(page).response["violations"]
    assert [(item["id"], [node["html"] for node in item["nodes"]]) for item in found] == []


def downloaded(page: Any, link: str = "#download") -> tuple[str, bytes]:
    with page.expect_download() as download:
        page.click(link)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def settings_in(png: bytes) -> dict[str, Any]:
    with Image.open(BytesIO(png)) as image:
        found: dict[str, Any] = json.loads(image.text["latentforge"])  # type: ignore[attr-defined]
        return found


def jobs_of(page: Any) -> list[Any]:
    """Return the states of the gallery's images."""
    return [re.sub(r":.*", "", label) for label in labels(page)]


def labels(page: Any) -> list[str]:
    found: list[str] = page.locator("#thumbs button").evaluate_all(
        "items => items.map(item => item.ariaLabel)"
    )
    return found


def test_image_is_generated_shown_and_downloaded(page: Any) -> None:
    check_accessible(page)
    generate(page, seed=7)
    expect(page.locator("#download")).to_be_visible()
    expect(page.locator("#picture")).to_have_attribute("alt", PROMPT)
    expect(page.locator("#caption-facts")).to_have_text(re.compile(r"seed 7 · [\d.]+ s$"))
    check_accessible(page)
    name, content = downloaded(page)
    assert name == "owl-on-a-pink-background-7.png"
    assert settings_in(content)["prompts"] == [PROMPT]
    assert settings_in(content)["seed"] == 7


def test_progress_is_watched_and_cancelled(page: Any, site: Site) -> None:
    with page.expect_response("**/v1/jobs") as answer:
        generate_long(page)
    expect(page.locator("#step")).to_have_text(RUNNING)
    expect(page.locator("#left")).to_have_text(re.compile(r"about \d+ (s|min) left"))
    expect(page.locator("#picture")).to_be_visible()
    expect(page.locator("#picture")).to_have_attribute("alt", "Preview")
    assert page.locator("#picture").evaluate("image => image.naturalWidth") > 0
    assert 0 < float(page.locator("#bar").evaluate("bar => bar.value")) < 1
    check_accessible(page)
    page.focus("#cancel")
    page.keyboard.press("Enter")
    expect(page.locator("#lost")).to_have_text("Cancelled.")
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#again")).to_be_focused()
    job = httpx.get(f"{site.url}/v1/jobs/{answer.value.json()['id']}", trust_env=False).json()
    assert job["status"] == "cancelled"


def test_several_images_of_one_request(page: Any) -> None:
    generate(page, n=3, seed=5, steps=4)
    expect(page.locator("#thumbs button")).to_have_count(3)
    expect(page.locator("#thumbs img:not([hidden])")).to_have_count(3)
    page.locator("#thumbs button").nth(2).click()
    expect(page.locator("#caption-facts")).to_contain_text("Image 3 of 3")
    expect(page.locator("#download")).to_be_visible()
    assert settings_in(downloaded(page)[1])["seed"] == 7


def test_reload_finds_the_running_and_the_finished(page: Any) -> None:
    generate(page, seed=1, steps=4)
    expect(page.locator("#download")).to_be_visible()
    generate_long(page, "penguin")
    expect(page.locator("#step")).to_have_text(RUNNING)
    page.reload()
    expect(page.locator("#step")).to_have_text(RUNNING)
    assert [label.split(": ")[-1] for label in labels(page)] == ["penguin", PROMPT]
    assert page.input_value("#prompt") == "penguin"
    assert page.input_value("#steps") == str(LONG)
    assert page.input_value("#width") == "128"
    page.click("#cancel")
    page.locator("#thumbs button").nth(1).click()
    expect(page.locator("#download")).to_be_visible()
    assert settings_in(downloaded(page)[1])["seed"] == 1


def test_reload_before_the_answer_finds_the_job(page: Any) -> None:
    jobs: list[str] = []

    def withhold(route: Any) -> None:
        """Give no answer to the first request; ends only with the page that waits for it."""
        if jobs:
            route.continue_()
        else:
            jobs.append(route.fetch().json()["id"])

    page.route("**/v1/jobs", withhold)
    generate(page, steps=4)
    while not jobs:
        page.wait_for_timeout(20)
    with page.expect_request(lambda request: f"/v1/jobs/{jobs[0]}" in request.url):
        page.reload()
    expect(page.locator("#download")).to_be_visible()
    assert labels(page) == [PROMPT]


def test_text_that_was_not_read_is_said(page: Any) -> None:
    generate(page, "owl " * 80, steps=2)
    expect(page.locator("#caption-warning")).to_contain_text("did not read: 'owl owl")
    check_accessible(page)
    page.reload()
    expect(page.locator("#caption-warning")).to_contain_text("The prompt is too long")
    generate(page, steps=2)
    expect(page.locator("#caption-prompt")).to_have_text(PROMPT)
    expect(page.locator("#caption-warning")).to_be_empty()


def test_tabs_have_sessions_of_their_own(page: Any) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    generate(page, "owl", steps=4)
    generate(other, "penguin", steps=4)
    for tab, prompt in ((page, "owl"), (other, "penguin")):
        expect(tab.locator("#download")).to_be_visible()
        assert labels(tab) == [prompt]
        tab.reload()
        expect(tab.locator("#download")).to_be_visible()
        assert labels(tab) == [prompt]


def test_more_jobs_than_a_browser_opens_connections(page: Any) -> None:
    generate_long(page, "owl 0")
    expect(page.locator("#thumbs button")).to_have_count(1)
    page.select_option("#size", "64x64")
    for index in range(1, 8):
        generate(page, f"owl {index}", steps=1, seed=index)
        expect(page.locator("#problem")).to_be_empty()
        expect(page.locator("#thumbs button")).to_have_count(index + 1)
    page.locator("#thumbs button").last.click()
    expect(page.locator("#caption-prompt")).to_have_text("owl 0")
    page.click("#cancel")
    expect(page.locator("#thumbs .state").last).to_have_text("Cancelled")
    expect(page.locator("#thumbs img:not([hidden])")).to_have_count(7)


def test_link_is_shared_with_someone_without_the_session(page: Any, visit: Open) -> None:
    hostile = "<img src=x onerror=alert(1)> owl"
    generate(page, hostile, steps=4)
    page.click("#share")
    check_accessible(page)
    link = page.input_value("#share-link")
    page.keyboard.press("Escape")
    shared = visit(link)
    expect(shared.locator(".prompt")).to_have_text(hostile)
    assert shared.locator("main img").evaluate("image => image.naturalWidth") == 64
    check_accessible(shared)
    assert settings_in(downloaded(shared, "a[download]")[1])["prompts"] == [hostile]


def test_server_restart_loses_what_ran_and_says_so(visit: Open, site: Site) -> None:
    page = visit()
    generate(page, "penguin", seed=3, steps=4)
    expect(page.locator("#download")).to_be_visible()
    kept = downloaded(page)
    generate_long(page, seed=4)
    expect(page.locator("#step")).to_have_text(RUNNING)
    site.end()
    expect(page.locator("#step")).to_have_text("Waiting for the server")
    expect(page.locator("#server")).to_have_text("Server not reached")
    check_accessible(page)
    site.start()
    expect(page.locator("#lost")).to_contain_text("it was restarted")
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    page.locator("#thumbs button").last.click()
    assert downloaded(page) == kept
    page.click("#share")
    expect(page.locator("#stage-problem")).to_contain_text("no longer has this image")
    page.click("#again")
    expect(page.locator("#thumbs button")).to_have_count(3)
    expect(page.locator("#share")).to_be_visible()
    assert downloaded(page)[1] == kept[1]


def test_keyboard_alone(page: Any) -> None:
    expect(page.locator("#generate")).to_be_enabled()
    seen = []
    page.locator("body").press("Tab")
    for _ in range(12):
        seen.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert seen[1:4] == ["prompt", "negative", "generate"]
    assert {"size", "n", "steps", "guidance", "sampler", "seed"} <= set(seen)
    page.focus("#prompt")
    page.keyboard.type("owl")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#download")).to_be_visible()
    expect(page.locator("#status")).to_have_text("The image is ready.")
    page.focus("#share")
    page.keyboard.press("Enter")
    expect(page.locator("#share-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "share"


def run_program(page: Any) -> None:
    """Run the Python program that the page shows, with OpenAI's client."""
    pytest.importorskip("openai")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        exec(compile(page.inner_text("#python"), "program", "exec"), {})


def test_code_repeats_the_image(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(page, 'owl\'s "nest" $HOME `id` \\ 1', seed=9, steps=4, negative="it's {blue}")
    expect(page.locator("#download")).to_be_visible()
    expected = settings_in(downloaded(page)[1])
    page.click("#code")
    check_accessible(page)
    monkeypatch.chdir(tmp_path)
    if shutil.which("curl"):
        subprocess.run(["bash", "-c", page.inner_text("#curl")], check=True, timeout=60)
        assert settings_in(Path("image.png").read_bytes()) == expected
        Path("image.png").unlink()
    run_program(page)
    assert settings_in(Path("image.png").read_bytes()) == expected


def test_error_of_the_server_marks_its_field(page: Any) -> None:
    expect(page.locator("#generate")).to_be_enabled()
    page.select_option("#sampler", "lcm")
    generate(page, steps=300)
    expect(page.locator("#problem")).to_contain_text("takes at most 50")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#steps")).to_be_focused()
    check_accessible(page)
    page.fill("#steps", "4")
    assert page.locator("#steps").get_attribute("aria-invalid") is None


def test_wrong_value_in_a_closed_section_is_shown(page: Any) -> None:
    generate(page, "", steps=2000)
    page.click("#settings summary")
    generate(page)
    expect(page.locator("#settings")).to_have_attribute("open", "")
    expect(page.locator("#steps")).to_be_focused()
    assert labels(page) == []


def blue(path: Path, size: tuple[int, int]) -> Path:
    Image.new("RGB", size, (0, 0, 255)).save(path)
    return path


def test_image_to_start_from_with_a_painted_mask(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(page.locator("#generate")).to_be_enabled()
    page.set_input_files("#file", blue(tmp_path / "wide.png", (300, 200)))
    expect(page.locator("#source-image")).to_be_visible()
    page.click("#mask-open")
    layer = page.locator("#mask-layer").bounding_box()
    left, top = layer["x"] + layer["width"] / 2, layer["y"] + layer["height"] / 2
    page.mouse.move(left - 20, top)
    page.mouse.down()
    page.mouse.move(left + 20, top, steps=4)
    page.mouse.up()
    check_accessible(page)
    page.click("#mask-dialog button[value=ok]")
    expect(page.locator("#source-mask")).to_be_visible()
    generate(page, steps=8, seed=2)
    expect(page.locator("#download")).to_be_visible()
    made = downloaded(page)[1]
    with Image.open(BytesIO(made)) as image:
        red, _, corner = image.getpixel((2, 2))
        assert red < 40 and corner > 200
        assert image.getpixel((32, 32)) != image.getpixel((2, 2))
    page.click("#code")
    expect(page.locator("#code-files a")).to_have_count(2)
    for name in ("image.png", "mask.png"):
        file = downloaded(page, f"#code-files a[download='{name}']")[1]
        (tmp_path / name).write_bytes(file)
    monkeypatch.chdir(tmp_path)
    run_program(page)
    assert settings_in(Path("image.png").read_bytes()) == settings_in(made)


def test_model_with_a_depth_map(visit: Open, tmp_path: Path) -> None:
    """A map of the request's shape is sent as it is, with 16 bits; another as the image is cut."""
    pytest.importorskip("onnxruntime")
    from test_service import depth_engines

    directory = depth_engines(tmp_path)
    levels = np.arange(1000, 1000 + 32 * 48, dtype=np.uint16).reshape(32, 48)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    Image.fromarray(np.tile(levels, 2)).save(tmp_path / "wide-depth.png")

    def context() -> Context:
        service = Service([ModelSource(name="deep", directory=directory)])
        return Context(service=service, metrics=service.metrics)

    with served(context) as server:
        page = visit(server.url)
        expect(page.locator("#depth")).to_be_visible()
        page.set_input_files("#file", blue(tmp_path / "wide.png", (96, 32)))
        expect(page.locator("#source-image")).to_be_visible()
        generate(page, seed=1)
        expect(page.locator("#problem")).to_contain_text("depth map")
        for name in ("depth.png", "wide-depth.png"):
            page.set_input_files("#depth-file", tmp_path / name)
            expect(page.locator("#depth-image")).to_be_visible()
            check_accessible(page)
            with page.expect_request("**/v1/jobs") as sent:
                generate(page, seed=1)
            map = Image.open(BytesIO(base64.b64decode(sent.value.post_data_json["depth_map"])))
            assert map.size == (48, 32)
            assert name != "depth.png" or np.array_equal(np.asarray(map), levels)
            expect(page.locator("#download")).to_be_visible()
            expect(page.locator("#code")).to_be_hidden()
            page.click("#depth-remove")
            expect(page.locator("#depth-choose")).to_be_focused()
        page.close()


def test_mask_is_painted_by_keyboard(page: Any, tmp_path: Path) -> None:
    expect(page.locator("#generate")).to_be_enabled()
    page.set_input_files("#file", blue(tmp_path / "blue.png", (64, 64)))
    page.click("#mask-open")
    expect(page.locator("#mask-layer")).to_be_focused()
    painted = (
        "layer => layer.getContext('2d').getImageData(0, 0, 512, 512).data.some(value => value)"
    )
    for keys in (("ArrowRight", "Space"), ("+", "ArrowDown", "Space")):
        for key in keys:
            page.keyboard.press(key)
        assert page.locator("#mask-layer").evaluate(painted)
    expect(page.locator("#mask-ring")).to_be_visible()
    page.click("#mask-undo")
    page.click("#mask-undo")
    assert not page.locator("#mask-layer").evaluate(painted)
    page.click("#mask-dialog button[value=ok]")
    expect(page.locator("#source-mask")).to_be_hidden()


def test_pasted_picture_and_generated_one_are_starts(page: Any) -> None:
    generate(page, steps=4)
    expect(page.locator("#download")).to_be_visible()
    page.evaluate(
        """async () => {
          const layer = new OffscreenCanvas(64, 64);
          layer.getContext("2d").drawImage(document.getElementById("picture"), 0, 0);
          const blob = await layer.convertToBlob({ type: "image/png" });
          const data = new DataTransfer();
          data.items.add(new File([blob], "a.png", { type: "image/png" }));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }"""
    )
    expect(page.locator("#chosen")).to_be_visible()
    page.click("#source-remove")
    expect(page.locator("#chosen")).to_be_hidden()
    page.click("#start-from")
    expect(page.locator("#chosen")).to_be_visible()


def test_removed_and_cleared_images_are_gone(page: Any) -> None:
    for prompt in ("owl", "penguin", "dog"):
        generate(page, prompt, steps=1)
        expect(page.locator("#caption-prompt")).to_have_text(prompt)
        expect(page.locator("#download")).to_be_visible()
    page.click("#remove")
    assert labels(page) == ["penguin", "owl"]
    page.click("#clear")
    page.click("#clear-dialog button[value=ok]")
    expect(page.locator("#thumbs button")).to_have_count(0)
    page.reload()
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#thumbs button")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_in_light_and_dark(visit: Open, scheme: str) -> None:
    page = visit(color_scheme=scheme, **PHONE)
    page.tap("#settings summary")
    page.tap("#source summary")
    generate(page, steps=4)
    expect(page.locator("#download")).to_be_visible()
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 27)"
    assert dark == (scheme == "dark")


def test_server_with_a_key_asks_for_it(visit: Open, null_engines: Path) -> None:
    def owner(key: str | None) -> str:
        if key != "a-key-of-the-test":
            raise KeyRequiredError("this server needs an API key")
        return "someone"

    def context() -> Context:
        service = Service([ModelSource(name="null", directory=null_engines)])
        return Context(service=service, metrics=service.metrics)

    with served(context, authenticate=owner) as locked:
        page = visit(locked.url)
        page.fill("#key", "wrong")
        page.click("#key-dialog button[value=ok]")
        expect(page.locator("#key-note")).to_contain_text("refused")
        check_accessible(page)
        page.fill("#key", "a-key-of-the-test")
        page.keyboard.press("Enter")
        generate(page, steps=4)
        expect(page.locator("#download")).to_be_visible()
        expect(page.locator("#share")).to_be_hidden()  # this server has no folder for them
        page.reload()
        expect(page.locator("#server")).to_have_attribute("data-state", "ready")
        page.click("#code")
        expect(page.locator("#curl")).to_contain_text("$LATENTFORGE_API_KEY")
        assert "a-key-of-the-test" not in page.content()
        page.close()
