"""The HTTP side of a plain server: one pipeline, one lock, and FastAPI's pool of threads."""

import argparse
import io
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Response
from PIL import Image
from pydantic import BaseModel

__all__ = ["PictureOrder", "arguments", "serve"]


class PictureOrder(BaseModel):
    """Image that a client asks for."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int


def arguments() -> argparse.Namespace:
    """Return the arguments of a server's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of the converted model")
    parser.add_argument("port", type=int)
    parser.add_argument("--f32", action="store_true", help="compute in float32, whatever the CPU")
    return parser.parse_args()


def serve(generate: Callable[[PictureOrder], Image.Image], port: int) -> None:
    """Answer requests for images with PNG files, one after another."""
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    def answer(order: PictureOrder) -> Response:
        with lock:
            image = generate(order)
        file = io.BytesIO()
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
