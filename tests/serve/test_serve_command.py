"""The command ``serve``: what it refuses, how it starts, and how signals end it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from latentforge.__main__ import main
from latentforge.runtime.manifest import Manifest
from latentforge.serve.keys import KeyRing

QUICK = ("--port", "0", "--measure-seconds", "0")
LONG = {"prompt": "a red apple", "num_inference_steps": 500, "n": 10, "size": "512x512"}


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Run the command, and give its process and a client once it is ready."""
    command = [sys.executable, "-m", "latentforge", "serve", *map(str, arguments), *QUICK]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "ready\n"))
        url = re.search(r"http://\S+", lines[0])
        assert url, process.communicate()
        with httpx.Client(base_url=url[0], timeout=60, trust_env=False) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_sigterm_lets_accepted_requests_end(null_engines: Path) -> None:
    with serving(null_engines) as (process, client), ThreadPoolExecutor() as pool:
        assert client.get("/readyz").status_code == 200
        answer = pool.submit(client.post, "/v1/images/generations", json={**LONG, "n": 3})
        wait_for_job(client)
        process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:  # until the signal has arrived
            pass
        refused = client.post("/v1/images/generations", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert len(answer.result().raise_for_status().json()["data"]) == 3
        assert process.wait(20) == 0
        _, log = process.communicate()
    assert all(json.loads(line)["level"] for line in log.splitlines())
    assert "red apple" not in log


def test_sigterm_while_requests_are_refused(null_engines: Path) -> None:
    path = "/v1/images/generations"
    with serving(null_engines, "--queue-seconds", "0") as (process, client):

        def refusal() -> str:
            return str(client.post(path, json=LONG).json()["error"]["code"])

        short = {"prompt": "a", "num_inference_steps": 1}
        client.post(path, json=short).raise_for_status()  # so that the speed is known
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(client.post, path, json={**LONG, "n": 4})
            wait_for_job(client)
            assert [refusal() for _ in range(3)] == ["queue_full"] * 3
            process.send_signal(signal.SIGTERM)
            while (code := refusal()) == "queue_full":  # until the signal has arrived
                pass
            assert code == "draining"
            assert len(answer.result().raise_for_status().json()["data"]) == 4
        assert process.wait(20) == 0


def test_the_time_for_accepted_requests_ends(null_engines: Path) -> None:
    with serving(null_engines, "--drain-timeout", "0.3") as (process, client):
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(client.post, "/v1/images/generations", json=LONG)
            wait_for_job(client)
            process.send_signal(signal.SIGTERM)
            assert answer.result().json()["error"]["code"] == "draining"
        assert process.wait(10) == 0


def test_a_second_signal_ends_at_once(null_engines: Path) -> None:
    with serving(null_engines) as (process, client):
        client.post("/v1/jobs", json=LONG).raise_for_status()
        wait_for_job(client)
        workers = children(process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        assert process.poll() is None and workers
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def wait_for_job(client: httpx.Client) -> None:
    end = time.monotonic() + 20
    while 'latentforge_running{model="handmade"} 0.0' in client.get("/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], ["--keys", "--insecure"]),
        (["--host", "::"], ["--keys"]),
        (["--port", "70000"], ["65535"]),
        (["--host", "192.0.2.1", "--insecure"], ["192.0.2.1", "--port"]),
        (["--max-batch", "0"], ["max_batch"]),
        (["--keys", "nowhere.toml"], ["nowhere.toml"]),
        (["nowhere"], ["nowhere", "manifest.json"]),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], words: list[str], null_engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if arguments == ["nowhere"] else [str(null_engines)]
    assert main(["serve", *named, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_a_used_port_is_named(null_engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(null_engines), "--port", port]) == 2
    assert port in capsys.readouterr().err


def test_equal_names_are_refused(null_engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(null_engines), str(null_engines), "--port", "0"]) == 2
    assert "handmade" in capsys.readouterr().err


def test_a_new_key_opens_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--new-key", "alice"]) == 0
    entry, shown = capsys.readouterr()
    secret = shown.split()[-1]
    assert secret not in entry
    (tmp_path / "keys.toml").write_text(entry)
    assert KeyRing.read(tmp_path / "keys.toml").owner(secret) == "alice"


def test_the_demo_needs_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTFORGE_CACHE", "off")
    assert main(["serve", "--port", "0"]) == 2
    assert "LATENTFORGE_CACHE" in capsys.readouterr().err


def test_the_demo_in_the_cache_is_served(
    null_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this code wrote it, whole, and from the checkpoint that is installed."""
    from latentforge import demo_engines

    monkeypatch.setenv("LATENTFORGE_CACHE", str(tmp_path))
    built: list[Any] = []
    monkeypatch.setattr(demo_engines, "_build", built.append)
    place = demo_engines.cached_demo_engines()
    assert place.is_relative_to(tmp_path) and built == [place]
    shutil.copytree(null_engines, place)
    assert demo_engines.cached_demo_engines() == place and built == [place]
    manifest = Manifest.read(place)
    for part in ("unet", "no-such-part"):
        other = msgspec.structs.replace(manifest.source, sha256={part: "0" * 64})
        msgspec.structs.replace(manifest, source=other).write(place)
        assert demo_engines.cached_demo_engines() == place
    assert built == [place] * 3


def test_engines_of_other_code_have_another_place(tmp_path: Path) -> None:
    from latentforge.demo_engines import _edition

    source = tmp_path / "export" / "families" / "unet.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1")
    first = _edition(tmp_path)
    source.write_text("a = 2")
    assert _edition(tmp_path) != first == first.strip("./")
