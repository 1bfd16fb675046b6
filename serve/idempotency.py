"""Idempotency keys: a request that is sent again gets the job of the first time.

After draft-ietf-httpapi-idempotency-key-header: the client chooses a key for each request that it
may have to repeat, and sends it in the header Idempotency-Key.
"""

from __future__ import annotations

from collections import OrderedDict

from latentforge.serve.errors import ReusedKeyError

__all__ = ["IdempotencyStore"]


class IdempotencyStore:
    """Jobs by owner and idempotency key, for a time.

    Args:
        seconds: time for which a key is remembered.
        keys: most keys that are; the oldest give way.
    """

    def __init__(self, *, seconds: float = 86_400.0, keys: int = 10_000) -> None:
        self._seconds = seconds
        self._keys = keys
        self._jobs: OrderedDict[tuple[str, str], tuple[float, str, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._jobs)

    def find(self, owner: str, key: str, fingerprint: str, now: float) -> str | None:
        """Return the job of an earlier request with this key; None if there was none.

        Args:
            owner: name of the API key.
            key: as the client sent it.
            fingerprint: digest of the route and the body.
            now: seconds.

        Raises:
            ReusedKeyError: that was another request.
        """
        self._expire(now)
        if (found := self._jobs.get((owner, key))) is None:
            return None
        _, earlier, job = found
        if fingerprint != earlier:
            raise ReusedKeyError(
                "this Idempotency-Key came with another request before: choose a new one for each "
                "request",
                param="Idempotency-Key",
            )
        return job

    def remember(self, owner: str, key: str, fingerprint: str, job: str, now: float) -> None:
        """Remember the job of a key."""
        self._expire(now)
        self._jobs.pop((owner, key), None)
        self._jobs[owner, key] = (now, fingerprint, job)
        if len(self._jobs) > self._keys:
            self._jobs.popitem(last=False)

    def forget(self, owner: str, key: str) -> None:
        """Forget a key, whose job failed or is no longer kept."""
        self._jobs.pop((owner, key), None)

    def _expire(self, now: float) -> None:
        while self._jobs:
            oldest = next(iter(self._jobs))
            if now - self._jobs[oldest][0] < self._seconds:
                return
            del self._jobs[oldest]
