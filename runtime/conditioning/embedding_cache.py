"""Cache of text embeddings: prompts that repeat, such as negative ones, are encoded once."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

__all__ = ["EmbeddingCache", "Embeddings"]

Embeddings = dict[str, NDArray[np.float32]]
"""Outputs of a text encoder for one text, (1, ...) each."""


class EmbeddingCache:
    """Outputs of text encoders by encoder and token ids; the least recent give way.

    It keeps hashes, not texts. Threads may share it.

    Args:
        size: texts per encoder to keep.
        encoders: number of encoders.

    Attributes:
        hits: texts that were found.
        misses: texts that were encoded.
    """

    def __init__(self, size: int, encoders: int = 1) -> None:
        self.hits = self.misses = 0
        self._size = size * encoders
        self._kept: OrderedDict[bytes, Embeddings] = OrderedDict()
        self._lock = Lock()

    def get(
        self, encoder: str, ids: NDArray[np.generic], encode: Callable[[], Embeddings]
    ) -> Embeddings:
        """Return the outputs for token ids, from ``encode`` if they are not kept.

        The arrays are read-only.
        """
        key = hashlib.sha256(encoder.encode() + b"\0" + ids.tobytes()).digest()
        with self._lock:
            found = self._kept.get(key)
            self.hits, self.misses = self.hits + bool(found), self.misses + (not found)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        return self._keep(key, encode())

    def _keep(self, key: bytes, outputs: Embeddings) -> Embeddings:
        for array in outputs.values():
            array.setflags(write=False)
        with self._lock:
            self._kept[key] = outputs
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return outputs
