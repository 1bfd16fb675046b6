"""Server on a real socket, in a thread of the test's process."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn
from conftest import handmade_engines

from latentforge.runtime.manifest import Manifest, PreviewMap
from latentforge.runtime.tensor import TensorSpec
from latentforge.serve.http.app import create_app
from latentforge.serve.http.connection import BoundedConnection
from latentforge.serve.http.context import Context


def complete_engines(folder: Path) -> Path:
    """Write null engines that encode images and make previews."""
    directory = handmade_engines(folder)
    manifest = Manifest.read(directory)
    encoder = msgspec.structs.replace(
        manifest.components["vae_decoder"],
        inputs={"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
        outputs={"latent_parameters": TensorSpec("float32", ("batch", 8, "height//8", "width//8"))},
    )
    components = {**manifest.components, "vae_encoder": encoder}
    preview = PreviewMap(weights=((0.1,) * 4,) * 3, offset=(0.0, 0.5, -0.5), correlation=0.9)
    changed = msgspec.structs.replace(manifest, components=components, preview=preview)
    changed.write(directory)
    return directory


@dataclass(frozen=True)
class Served:
    """Address of a running server, and what runs in it."""

    port: int
    context: Context
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)

    def value(self, name: str, **labels: str) -> float:
        """Return the value of a metric."""
        return self.context.metrics.registry.get_sample_value(name, labels) or 0.0

    def call(self, work: Callable[[], Any]) -> Any:
        """Call a function in the server's thread."""

        async def called() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(20)


@contextmanager
def served(
    make_context: Callable[[], Context],
    connection: type[BoundedConnection] = BoundedConnection,
    *,
    start: bool = True,
    **options: Any,
) -> Iterator[Served]:
    """Run a server and its service while the block runs; the context is made in its thread.

    Without `start` the service has no workers, for tests that generate nothing.
    """
    started, running = threading.Event(), []

    async def run() -> None:
        context = make_context()
        app = create_app(context, **options)
        if start:
            await context.service.start()
        config = uvicorn.Config(
            app, port=0, http=connection, lifespan="off", ws="none", log_config=None,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        running.append((server, Served(port, context, asyncio.get_running_loop())))
        started.set()
        await task
        await context.service.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(20)
    ((server, found),) = running
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
