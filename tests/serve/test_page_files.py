"""Files of the page: complete, from this server alone, and with the headers that hold that."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from latentforge.serve.http.page import page_routes

PAGE = Path(__file__).resolve().parents[2] / "serve" / "page"


def get(path: str, **headers: str) -> httpx.Response:
    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(app=Starlette(routes=[*page_routes()]))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(answer())


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/style.css", "/page/icon.svg"])
def test_files_are_what_they_are_and_load_nothing_from_elsewhere(path: str) -> None:
    answer = get(path)
    directives = answer.headers["content-security-policy"].split("; ")
    policy = dict(directive.split(" ", 1) for directive in directives)
    assert answer.status_code == 200
    assert policy["default-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    kinds = {"": "html", ".js": "javascript", ".css": "css", ".svg": "svg"}
    assert kinds[Path(path).suffix] in answer.headers["content-type"]


def test_browser_that_has_a_file_is_not_sent_it_again() -> None:
    first = get("/page/main.js")
    again = get("/page/main.js", **{"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert get("/page/main.js", **{"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/share.html", "/page/", "/page/../page.py", "/page/%2e%2e/share.py"]
)
def test_nothing_else_is_served(path: str) -> None:
    assert get(path).status_code == 404


def test_every_file_that_is_loaded_exists_and_every_file_is_loaded() -> None:
    texts = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    loaded = set(re.findall(r"page/([\w.-]+)", get("/").text))
    loaded |= {name for text in texts.values() for name in re.findall(r'from "\./([\w.-]+)"', text)}
    assert loaded == {name for name in texts if not name.endswith(".html")}
    assert all(get(f"/page/{name}").status_code == 200 for name in loaded)


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_no_inline_script_or_style_and_no_foreign_address(path: Path) -> None:
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|[\"'(]//\w", text)
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|\son\w+=\"|\sstyle=\"", text)
    assert "innerHTML" not in text


def test_page_names_only_elements_that_it_has() -> None:
    html = get("/").text
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    used = {
        name
        for path in PAGE.glob("*.js")
        for name in re.findall(r'\$\("([\w-]+)"\)', path.read_text("utf-8"))
    }
    used |= set(re.findall(r'(?:for|aria-\w+by)="([\w-]+)"', html))
    assert used <= set(ids)
