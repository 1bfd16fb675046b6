"""API keys, kept as digests, and the limits of their owners."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.validation import checked_path
from latentforge.serve.errors import BadRequestError, KeyRequiredError, QuotaError
from latentforge.serve.scheduler.limits import OwnerLimits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ANYONE", "ApiKey", "KeyRing", "RateLimiter", "digest_of"]

ANYONE = "anonymous"
"""Owner of all requests to a server without keys."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Amount = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a key, as it stands in the file of keys."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class ApiKey(Record, frozen=True, kw_only=True):
    """Key of one owner, and what the owner may use; None for no limit.

    Attributes:
        sha256: of the key, in hexadecimal.
        rate: work per second in the long run, in steps of 512 x 512 pixels.
        burst: work that may come at once after a pause; a minute of the rate if None.
        concurrent: jobs that run at once; further ones wait.
        queued: jobs that wait; further ones are refused.
    """

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    rate: _Amount | None = None
    burst: _Amount | None = None
    concurrent: _Count | None = None
    queued: _Count | None = None

    @property
    def owner_limits(self) -> OwnerLimits:
        """Limits that the scheduler holds."""
        return OwnerLimits(concurrent=self.concurrent, queued=self.queued)


class _KeyFile(Record, frozen=True, kw_only=True):
    """File of keys: a table for each owner."""

    keys: Mapping[str, ApiKey]


@dataclass(frozen=True)
class KeyRing:
    """Keys by the name of their owner; without any, every request is anyone's."""

    keys: Mapping[str, ApiKey] = field(default_factory=dict)

    @classmethod
    def of(cls, secrets: Iterable[str]) -> KeyRing:
        """Return a ring of plain keys without limits, named key1, key2, …"""
        named = enumerate(secrets, 1)
        return cls({f"key{index}": ApiKey(sha256=digest_of(secret)) for index, secret in named})

    @classmethod
    def read(cls, path: Path) -> KeyRing:
        """Read a file of keys, in TOML: a table ``[keys.NAME]`` with ``sha256`` for each owner.

        Raises:
            SettingsError: the file is missing or malformed.
        """
        path = checked_path("keys", path)
        try:
            found = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _KeyFile)
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SettingsError(f"{path}: {reason}") from error
        for name in found.keys:
            if not _NAME.fullmatch(name) or name == ANYONE:
                raise SettingsError(
                    f"{path}: a name of a key has 1 to 64 letters, digits, dots, dashes and "
                    f"underlines, and is not {ANYONE!r}: {name!r}"
                )
        if len({key.sha256 for key in found.keys.values()}) < len(found.keys):
            raise SettingsError(f"{path}: two names have the same key: give each its own")
        return cls(found.keys)

    @property
    def limits(self) -> Mapping[str, OwnerLimits]:
        """Limits that the scheduler holds, by owner."""
        return {name: key.owner_limits for name, key in self.keys.items()}

    def owner(self, secret: str | None) -> str:
        """Return the owner of a key; every key is compared, in constant time.

        Raises:
            KeyRequiredError: there is no such key, or none was given.
        """
        if not self.keys:
            return ANYONE
        digest = digest_of(secret or "")
        found = [n for n, key in self.keys.items() if hmac.compare_digest(key.sha256, digest)]
        if not secret or not found:
            raise KeyRequiredError(
                "this server needs a valid API key: send it as Authorization: Bearer KEY"
            )
        return found[0]


class RateLimiter:
    """Limit of the work of each owner over time.

    This is the generic cell rate algorithm (ITU-T I.371): for each owner it keeps the time at which
    the work so far would be paid at the owner's rate, and accepts work as long as that is at most a
    burst ahead.

    Args:
        ring: the keys with their rates.
    """

    def __init__(self, ring: KeyRing) -> None:
        self._keys = ring.keys
        self._paid: dict[str, float] = {}

    def check(self, owner: str, cost: float, now: float) -> None:
        """Refuse work of an owner that comes too early.

        Raises:
            QuotaError: it does; the error has the seconds to wait.
            BadRequestError: it is more than may ever come at once.
        """
        key = self._keys.get(owner)
        if key is None or key.rate is None:
            return
        burst = key.burst if key.burst is not None else 60 * key.rate
        if cost > burst:
            raise BadRequestError(
                f"this request is work of {cost:g} units, and this key may use {burst:g} at once: "
                "ask for fewer images or steps, or a smaller size"
            )
        early = self._due(owner, now) + cost / key.rate - now - burst / key.rate
        if early > 1e-9:
            raise QuotaError(
                f"this key may use {key.rate:g} units of work a second: try again in "
                f"{math.ceil(early)} seconds",
                retry_after=early,
            )

    def charge(self, owner: str, cost: float, now: float) -> None:
        """Count work of an owner that was accepted."""
        key = self._keys.get(owner)
        if key is not None and key.rate is not None:
            self._paid[owner] = self._due(owner, now) + cost / key.rate

    def _due(self, owner: str, now: float) -> float:
        return max(now, self._paid.get(owner, now))
