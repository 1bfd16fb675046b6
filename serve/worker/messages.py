"""Messages between the server and a worker process, over a pair of sockets.

A frame is four bytes of length, the highest first, and then one message in MessagePack. The server
sends LoadEngines first, and a batch when the one before has ended; CancelBatch and Ping at any
time. The worker answers:

    LoadEngines ─► EnginesLoaded, or LoadFailed and its end
    RunBatch    ─► StepDone, not for every quick step, then BatchDone, BatchStopped or BatchFailed
    Ping        ─► Pong, between two steps at the latest
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import BackendError
from latentforge.runtime.settings import Settings

__all__ = [
    "Answer",
    "BatchDone",
    "BatchEnd",
    "BatchFailed",
    "BatchStopped",
    "CancelBatch",
    "EnginesLoaded",
    "FrameReader",
    "LoadEngines",
    "LoadFailed",
    "Order",
    "Ping",
    "Pong",
    "RawArray",
    "RunBatch",
    "StepDone",
    "frame",
]

_MAX_FRAME = 1 << 31
_LENGTH = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()


class RawArray(msgspec.Struct, frozen=True, kw_only=True):
    """Array of pixels (8 bits), or of depths (32-bit floats)."""

    kind: Literal["uint8", "float32"]
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[Any]) -> "RawArray":
        """Pack an array of one of these kinds."""
        kind: Literal["uint8", "float32"] = "uint8" if array.dtype == np.uint8 else "float32"
        return cls(kind=kind, shape=array.shape, data=array.astype(kind, copy=False).tobytes())

    @property
    def array(self) -> NDArray[Any]:
        """The array, read-only.

        Raises:
            ValueError: the data does not have this shape.
        """
        return np.frombuffer(self.data, self.kind).reshape(self.shape)

    @property
    def parts(self) -> tuple[NDArray[Any], ...]:
        """The arrays along the first axis, each in memory of its own: a view would keep them all.

        Raises:
            ValueError: the data does not have this shape.
        """
        return tuple(part.copy() for part in self.array)


class LoadEngines(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order to load an engine directory; the first that a worker gets.

    Attributes:
        directory: absolute path.
        options: arguments of load().
    """

    directory: str
    options: dict[str, bool | int | float | str | None] = {}


class RunBatch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order to make the images of a batch.

    Attributes:
        batch: number of the batch.
        settings: complete settings, one prompt and one seed for each image.
        images: initial images (h, w, 3), one for each prompt; none for text to image.
        mask: light where to paint, (h, w).
        depth: of each image, of the size of the latents.
        previews: previews that are wanted, as far as there are steps and the engines have a map.
    """

    batch: int
    settings: Settings
    images: tuple[RawArray, ...] = ()
    mask: RawArray | None = None
    depth: RawArray | None = None
    previews: int = 0


class CancelBatch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order to stop a batch after the step that runs; nothing if it has ended."""

    batch: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Question if the worker still reads its messages."""


class EnginesLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer of a worker that is ready: its engines are loaded, and have run one step.

    Attributes:
        seconds: from the order to this answer.
        versions: libraries that run the engines.
    """

    seconds: float
    versions: dict[str, str]


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer of a worker that cannot load its engines, and ends: the error's class and message."""

    error: str
    message: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Answer to a Ping."""


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Completed denoising step of a batch.

    Attributes:
        batch: number of the batch.
        step: steps completed so far, of ``count``.
        previews: (images, h, w, 3), of the latents' size, if they are due.
    """

    batch: int
    step: int
    count: int
    previews: RawArray | None = None


class BatchDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Finished images of a batch.

    Attributes:
        batch: number of the batch.
        images: (images, height, width, 3).
        ignored: of each image, the ends of its prompt and its negative prompt that are too long
            for the text encoders; empty where all is read.
        seconds: of the whole run in the worker.
        stages: seconds of each call of an engine, by stage.
    """

    batch: int
    images: RawArray
    ignored: tuple[tuple[str, str], ...]
    seconds: float
    stages: Mapping[str, tuple[float, ...]]


class BatchStopped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End of a batch that was cancelled, after ``steps`` steps."""

    batch: int
    steps: int


class BatchFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End of a batch that failed; the worker lives.

    Attributes:
        batch: number of the batch.
        code: ``invalid_value`` if the settings are the reason, ``out_of_memory``, or
            ``generation_failed``.
        message: of the error, one line.
    """

    batch: int
    code: str
    message: str


Order: TypeAlias = LoadEngines | RunBatch | CancelBatch | Ping
"""Message to a worker."""

BatchEnd: TypeAlias = BatchDone | BatchStopped | BatchFailed
"""Last answer about a batch."""

Answer: TypeAlias = EnginesLoaded | LoadFailed | Pong | StepDone | BatchEnd
"""Message from a worker."""


def frame(message: Order | Answer) -> bytearray:
    """Return a message as bytes to send.

    Raises:
        BackendError: it is longer than 2 GiB.
    """
    content = bytearray(_LENGTH.size)
    _ENCODER.encode_into(message, content, _LENGTH.size)
    length = len(content) - _LENGTH.size
    if length > _MAX_FRAME:
        raise BackendError(
            f"a message of {length:,} bytes is too long: use smaller batches (--max-batch)"
        )
    _LENGTH.pack_into(content, 0, length)
    return content


class FrameReader:
    """Decoder of a stream of frames that arrives in pieces.

    Args:
        kind: union of the messages to expect.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._held = bytearray()

    def feed(self, piece: bytes) -> Iterator[Any]:
        """Yield the messages that are complete with this piece.

        Raises:
            BackendError: the bytes are no such messages.
        """
        self._held += piece
        while len(self._held) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held)
            end = _LENGTH.size + length
            if length > _MAX_FRAME:
                raise BackendError("a worker process sent a frame that is too long")
            if len(self._held) < end:
                return
            message = self._decoded(_LENGTH.size, end)
            del self._held[:end]
            yield message

    def _decoded(self, start: int, end: int) -> Any:
        with memoryview(self._held) as held, held[start:end] as content:
            try:
                return self._decoder.decode(content)
            except msgspec.DecodeError as error:
                raise BackendError(f"a worker process sent an invalid message: {error}") from error
