"""API keys: their file, their owners, and the limits of these; and idempotency keys."""

from pathlib import Path

import pytest

from latentforge.runtime.errors import SettingsError
from latentforge.serve.errors import BadRequestError, KeyRequiredError, QuotaError, ReusedKeyError
from latentforge.serve.idempotency import IdempotencyStore
from latentforge.serve.keys import ANYONE, ApiKey, KeyRing, RateLimiter, digest_of
from latentforge.serve.scheduler.limits import OwnerLimits

SECRET = "correct horse battery"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_owners_have_keys_and_limits(tmp_path: Path) -> None:
    text = f'[keys.alice]\nsha256 = "{digest_of(SECRET)}"\nrate = 2\nconcurrent = 3\nqueued = 4\n'
    ring = KeyRing.read(written(tmp_path / "keys.toml", text))
    assert ring.owner(SECRET) == "alice"
    assert ring.limits == {"alice": OwnerLimits(concurrent=3, queued=4)}
    for wrong in (None, "", SECRET + " ", digest_of(SECRET), "\ud800"):
        with pytest.raises(KeyRequiredError, match="valid API key"):
            ring.owner(wrong)


def test_without_keys_every_request_is_anyones() -> None:
    assert KeyRing().owner(None) == KeyRing().owner("x") == ANYONE
    ring = KeyRing.of(["one", "two"])
    assert ring.owner("two") == "key2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = 1", "Expected `object`"),
        ("[keys", "keys.toml"),
        ("", "missing required field `keys`"),
        ("[keys.a]\nsha256 = 'plain'", "matching regex"),
        (f"[keys.a]\nsha256 = '{'0' * 64}'\nrates = 1", "unknown field `rates`"),
        (f"[keys.a]\nsha256 = '{'0' * 64}'\nrate = -1", "> 0.0"),
        (f"[keys.a]\nsha256 = '{'0' * 64}'\nrate = nan", "rate"),
        (f"[keys.a]\nsha256 = '{'0' * 64}'\nqueued = 0", ">= 1"),
        (f"[keys.'a b']\nsha256 = '{'0' * 64}'", "letters, digits"),
        (f"[keys.anonymous]\nsha256 = '{'0' * 64}'", "letters, digits"),
        (f"[keys.a]\nsha256 = '{'0' * 64}'\n[keys.b]\nsha256 = '{'0' * 64}'", "the same key"),
        ("x = " + "[" * 5000, "keys.toml"),
    ],
)
def test_a_faulty_file_of_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        KeyRing.read(written(tmp_path / "keys.toml", text))
    with pytest.raises(SettingsError, match="No such file"):
        KeyRing.read(tmp_path / "absent.toml")


def test_work_over_time_is_limited() -> None:
    ring = KeyRing(
        {"a": ApiKey(sha256="0" * 64, rate=2.0, burst=10.0), "b": ApiKey(sha256="1" * 64)}
    )
    limiter = RateLimiter(ring)
    for _ in range(2):
        limiter.check("a", 5, 100.0)
        limiter.charge("a", 5, 100.0)
    with pytest.raises(QuotaError, match="try again in 2 seconds") as refused:
        limiter.check("a", 4, 100.0)
    assert refused.value.retry_after == pytest.approx(2.0)
    with pytest.raises(QuotaError):
        limiter.check("a", 4, 101.9)
    limiter.check("a", 4, 102.0)
    limiter.check("a", 10, 1000.0)  # a pause is not saved beyond a burst
    limiter.charge("a", 10, 1000.0)
    with pytest.raises(QuotaError):
        limiter.check("a", 1, 1000.0)
    with pytest.raises(BadRequestError, match="may use 10 at once"):  # no use to try again
        limiter.check("a", 11, 5000.0)
    for owner in ("b", ANYONE):
        limiter.check(owner, 1e9, 0.0)
        limiter.charge(owner, 1e9, 0.0)


def test_the_long_run_is_the_rate() -> None:
    limiter = RateLimiter(KeyRing({"a": ApiKey(sha256="0" * 64, rate=3.0)}))
    now, work = 0.0, 0.0
    while now < 1000:
        try:
            limiter.check("a", 7, now)
            limiter.charge("a", 7, now)
            work += 7
        except QuotaError as error:
            now += error.retry_after or 0.0
    assert work == pytest.approx(3.0 * 1000 + 60 * 3, rel=0.01)  # and a burst of a minute


def test_a_repeated_request_finds_its_job() -> None:
    store = IdempotencyStore(seconds=10, keys=2)
    store.remember("me", "k", "body", "job1", 0)
    assert store.find("me", "k", "body", 9) == "job1"
    assert store.find("other", "k", "body", 9) is None
    with pytest.raises(ReusedKeyError, match="another request"):
        store.find("me", "k", "other body", 9)
    assert store.find("me", "k", "body", 10) is None
    for name in "abc":
        store.remember("me", name, "body", f"job {name}", 20)
    assert store.find("me", "a", "body", 20) is None and len(store) == 2
    store.forget("me", "c")
    assert store.find("me", "c", "body", 20) is None
