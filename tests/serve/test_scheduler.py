"""Scheduler: what runs next, with whom, and what is refused."""

import random
from dataclasses import replace

import numpy as np
import pytest
from simulation import PIXEL, image_request

from latentforge.runtime.errors import SettingsError
from latentforge.serve.errors import QueueFullError, QuotaError
from latentforge.serve.job import Cancelled, Completed, Failed, ImageDone, Stepped
from latentforge.serve.request import Batch, ImageRequest
from latentforge.serve.scheduler import BatchGains, Limits, OwnerLimits, Scheduler
from latentforge.serve.scheduler.throughput import Throughput
from latentforge.serve.turns import Turns

GAINS = BatchGains().measured("m", 512, 512, {1: 1.0, 2: 1.9, 4: 3.5, 8: 3.6})


def scheduler(limits: Limits | None = None, **owners: OwnerLimits) -> Scheduler:
    return Scheduler(limits, GAINS, owners)


def submit(
    to: Scheduler, job: str, request: ImageRequest, owner: str = "me", now: float = 0.0
) -> None:
    to.submit(job, request, owner=owner, deadline=None, now=now)


def jobs(batch: Batch | None) -> list[str]:
    return [row.job for row in batch.rows] if batch is not None else []


def finish(on: Scheduler, batch: Batch | None, now: float) -> list[object]:
    assert batch is not None
    changes = on.finished(batch.id, [PIXEL] * len(batch.rows), now)
    return [change.event for change in changes]


@pytest.mark.parametrize(
    ("rates", "size"),
    [
        ({}, 1),
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 1.09}, 1),
        ({1: 1.0, 2: 1.1}, 2),
        ({1: 1.0, 2: 1.0, 4: 4.0}, 1),
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: 2.1}, 4),
    ],
)
def test_batches_are_as_large_as_they_are_measured_to_gain(
    rates: dict[int, float], size: int
) -> None:
    gains = BatchGains().measured("m", 64, 64, rates)
    assert gains.batch_size("m", 64, 64) == size
    assert gains.batch_size("other", 64, 64) == 1


def test_sizes_that_were_not_measured_gain_as_the_next_larger() -> None:
    gains = BatchGains().measured("m", 64, 64, {1: 1.0, 2: 2.0, 4: 4.0})
    gains = gains.measured("m", 128, 128, {1: 1.0, 2: 2.0})
    sizes = {side: gains.batch_size("m", side, side) for side in (32, 64, 96, 128, 512)}
    assert sizes == {32: 4, 64: 4, 96: 2, 128: 2, 512: 2}


def test_images_of_one_kind_share_a_batch() -> None:
    queue = scheduler()
    submit(queue, "a", image_request(1))
    submit(queue, "b", image_request(1, steps=4))
    submit(queue, "c", image_request(3))
    first = queue.next_batch("m", 0, 0.0)
    assert jobs(first) == ["b"]  # the shorter
    second = queue.next_batch("m", 1, 0.0)
    assert jobs(second) == ["a", "c", "c", "c"]
    assert queue.next_batch("m", 2, 0.0) is None
    assert finish(queue, second, 1.0)[-1] == Completed()


def test_no_batch_is_larger_than_the_limit() -> None:
    queue = scheduler(Limits(max_batch=3))
    submit(queue, "a", image_request(5))
    assert [len(jobs(queue.next_batch("m", replica, 0.0))) for replica in (0, 1)] == [3, 2]


def test_models_have_queues_of_their_own() -> None:
    queue = scheduler()
    submit(queue, "a", image_request(1, model="other"))
    assert queue.next_batch("m", 0, 0.0) is None
    assert jobs(queue.next_batch("other", 1, 0.0)) == ["a"]


def test_owners_have_equal_shares() -> None:
    """One who sends a hundred requests does not keep another waiting."""
    queue = scheduler(Limits(max_batch=1))
    for index in range(100):
        submit(queue, f"many{index}", image_request(1), owner="many")
    order = []
    for index in range(20):
        if index >= 4:
            submit(queue, f"few{index}", image_request(1), owner="few")
        batch = queue.next_batch("m", 0, float(index))
        order += jobs(batch)
        finish(queue, batch, index + 0.5)
    later = order[4:]
    assert 7 <= sum(job.startswith("few") for job in later) <= 9
    assert order[:4] == [f"many{index}" for index in range(4)]


def test_a_long_wait_has_a_turn_within_an_owner() -> None:
    """One turn: the rest of a huge job does not pass what came later."""
    queue = scheduler(Limits(aging_seconds=5))
    submit(queue, "huge", image_request(9, height=1024, width=1024))
    submit(queue, "small", image_request(1, steps=4), now=4.0)
    assert jobs(queue.next_batch("m", 0, 4.9)) == ["small"]
    submit(queue, "small2", image_request(1, steps=4), now=5.0)
    assert jobs(queue.next_batch("m", 1, 5.0)) == ["huge"] * 4
    assert jobs(queue.next_batch("m", 2, 5.0)) == ["small2"]


def test_equal_jobs_go_one_after_the_other() -> None:
    queue = scheduler(Limits(max_batch=1, interleave=False))
    for name in "abc":
        submit(queue, name, image_request(3))
    order = []
    while (batch := queue.next_batch("m", 0, 0.0)) is not None:
        order += jobs(batch)
        finish(queue, batch, 0.0)
    assert order == [*"aaabbbccc"]


def test_pictures_that_wait_are_bounded_in_memory() -> None:
    queue = scheduler(Limits(queue_bytes=1000))
    image = np.zeros((10, 20, 3), np.uint8)
    with_image = replace(image_request(1), image=image)
    submit(queue, "a", with_image)
    with pytest.raises(QueueFullError, match="hold 600 bytes"):
        submit(queue, "b", with_image)
    submit(queue, "c", image_request(1))
    queue.cancel("a", "client", 0.0)
    submit(queue, "d", with_image)


def test_a_short_batch_runs_beside_a_long_one() -> None:
    queue = scheduler()
    submit(queue, "long", image_request(1, steps=50))
    long = queue.next_batch("m", 0, 0.0)
    submit(queue, "same", image_request(1, steps=50))
    assert queue.next_batch("m", 0, 0.0) is None  # of the same kind
    submit(queue, "short", image_request(3))
    short = queue.next_batch("m", 0, 0.0)
    assert long is not None and jobs(short) == ["short", "short"]  # half of what remains
    assert queue.next_batch("m", 0, 0.0) is None  # two at once
    finish(queue, short, 1.0)
    queue.stepped(long.id, 40, 50, 2.0)
    assert queue.next_batch("m", 0, 2.0) is None  # the long one is soon done
    assert jobs(scheduler(Limits(interleave=False)).next_batch("m", 0, 0.0)) == []


def test_turns_give_the_later_batch_two_thirds() -> None:
    turns = Turns()
    turns.add(1)
    turns.ran(1, 10.0)
    turns.add(2)
    steps = []
    for _ in range(30):
        steps.append(turns.next())
        turns.ran(steps[-1], 1.0)
    assert steps[0] == 2 and steps.count(2) == 20
    turns.remove(2)
    assert turns.next() == 1 and len(turns) == 1
    turns.add(3)
    turns.remove(1)
    assert turns.next() == 3


def test_a_full_queue_refuses_with_the_time_to_wait() -> None:
    queue = scheduler(Limits(queue_seconds=10))
    submit(queue, "first", image_request(1))  # nothing is measured: accepted
    finish(queue, queue.next_batch("m", 0, 0.0), 2.0)  # 5 units a second
    for index in range(5):
        submit(queue, f"job{index}", image_request(1), now=2.0)
    wait = 10 / 0.9  # a tenth of the speed is held back
    assert queue.expected_wait("m") == pytest.approx(wait)
    with pytest.raises(QueueFullError, match="start in about 11 seconds.*in 3 seconds") as full:
        submit(queue, "late", image_request(1), now=2.0)
    assert full.value.retry_after == pytest.approx(wait / 4)
    submit(queue, "other", image_request(1), owner="other", now=2.0)  # has a share of its own
    assert queue.jobs == 6


def test_more_replicas_wait_less() -> None:
    queue = scheduler()
    queue.throughput.observe("m", 5.0)
    for index in range(4):
        submit(queue, f"job{index}", image_request(1))
    assert queue.expected_wait("m") == pytest.approx(8 / 0.9)
    queue.next_batch("other", 7, 0.0)
    queue.next_batch("m", 0, 0.0)
    queue.next_batch("m", 1, 0.0)
    assert queue.expected_wait("m") == pytest.approx(4 / 0.9)
    queue.replica_lost(1, 0.0)
    assert queue.expected_wait("m") == pytest.approx(8 / 0.9)


def test_a_request_that_cannot_meet_its_deadline_is_refused() -> None:
    queue = scheduler()
    queue.throughput.observe("m", 5.0)
    for index in range(3):
        submit(queue, f"job{index}", image_request(1))
    with pytest.raises(QueueFullError, match="done at its deadline"):
        queue.submit("late", image_request(1), owner="me", deadline=8.8, now=0.0)
    queue.submit("in time", image_request(1), owner="me", deadline=9.0, now=0.0)
    assert queue.wake_at(1.0) == 9.0


def test_the_number_of_jobs_is_limited() -> None:
    queue = scheduler(Limits(queue_jobs=2), few=OwnerLimits(queued=1))
    submit(queue, "a", image_request(4), owner="few")
    with pytest.raises(QuotaError, match="1 requests of this key wait"):
        submit(queue, "b", image_request(1), owner="few")
    submit(queue, "c", image_request(1))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        submit(queue, "d", image_request(1))


def test_jobs_of_an_owner_at_its_limit_wait_for_each_other() -> None:
    queue = scheduler(one=OwnerLimits(concurrent=1))
    submit(queue, "a", image_request(6), owner="one")
    first = queue.next_batch("m", 0, 0.0)
    assert jobs(first) == ["a"] * 4
    submit(queue, "b", image_request(1), owner="one")
    submit(queue, "c", image_request(1), owner="free")
    assert jobs(queue.next_batch("m", 1, 0.0)) == ["c", "a", "a"]  # no permit for b
    assert queue.next_batch("m", 2, 0.0) is None
    queue.cancel("a", "client", 1.0)
    assert jobs(queue.next_batch("m", 2, 1.0)) == ["b"]


def test_a_cancelled_job_ends_at_once_and_its_batch_goes_on() -> None:
    queue = scheduler()
    submit(queue, "a", image_request(1))
    submit(queue, "b", image_request(1))
    batch = queue.next_batch("m", 0, 0.0)
    assert batch is not None
    assert [change.event for change in queue.cancel("a", "client", 1.0)] == [Cancelled("client")]
    assert queue.cancel("a", "client", 1.0) == () == queue.cancel("unheard of", "client", 1.0)
    assert queue.stops() == ()
    changes = queue.stepped(batch.id, 1, 10, 1.0)
    assert [change.job for change in changes] == ["b"]
    queue.cancel("b", "client", 2.0)
    assert queue.stops() == ((0, batch.id),) and queue.stops() == ()
    assert (queue.running, queue.permits) == (0, 1)
    queue.stopped(batch.id, 2.0)
    assert queue.permits == 0
    assert queue.finished(batch.id, [PIXEL] * 2, 3.0) == ()  # too late


def test_a_poisoned_request_fails_alone() -> None:
    queue = scheduler()
    for name in "abc":
        submit(queue, name, image_request(1))
    batch = queue.next_batch("m", 0, 0.0)
    assert jobs(batch) == ["a", "b", "c"] and batch is not None
    assert queue.failed(batch.id, "NaN", 1.0) == ()
    ends = {}
    while (alone := queue.next_batch("m", 0, 1.0)) is not None:
        (name,) = jobs(alone)
        if name == "b":
            ends[name] = [change.event for change in queue.failed(alone.id, "NaN", 2.0)]
        else:
            ends[name] = finish(queue, alone, 2.0)[1:]
    assert ends == {
        "a": [Completed()],
        "b": [Failed("generation_failed", "NaN")],
        "c": [Completed()],
    }


def test_batches_that_exhaust_memory_become_smaller() -> None:
    queue = scheduler()
    submit(queue, "a", image_request(12))
    sizes = []
    while (batch := queue.next_batch("m", 0, 0.0)) is not None:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 1:
            queue.failed(batch.id, "no memory left", 1.0, "out_of_memory")
        else:
            finish(queue, batch, 1.0)
    assert sizes == [4, 1, 1, 1, 1, 2, 1, 1] + [1] * 6
    submit(queue, "small", image_request(4, height=256, width=256))
    assert len(jobs(queue.next_batch("m", 0, 2.0))) == 1  # as the next larger size
    assert GAINS.below(4, "m", 512, 512).batch_size("m", 512, 512) == 2


def test_the_throughput_is_measured_while_two_batches_take_turns() -> None:
    """Five units a second, however they are mixed; pauses do not count."""
    queue, now = scheduler(), 0.0
    submit(queue, "long", image_request(1, steps=49))
    long = queue.next_batch("m", 0, now)
    assert long is not None
    for step in range(1, 11):
        now += 0.2 * 49 / 50
        queue.stepped(long.id, step, 49, now)
        submit(queue, f"short{step}", image_request(1, steps=9), now=now)
        short = queue.next_batch("m", 0, now)
        assert short is not None
        now += 0.2 * 9
        finish(queue, short, now)
    assert queue.throughput.rates["m"] == pytest.approx(5.0)
    now += 0.2 * 49 * 40 / 50
    finish(queue, long, now)
    submit(queue, "later", image_request(1), now=now + 100)
    later = queue.next_batch("m", 0, now + 100)
    finish(queue, later, now + 102)
    assert queue.throughput.rates["m"] == pytest.approx(5.0)


def test_the_time_between_two_batches_counts_while_images_wait() -> None:
    queue, now = Scheduler(), 0.0
    for index in range(3):
        submit(queue, f"job{index}", image_request(1))
    for _ in range(3):  # 2 seconds of work, and half a second until the next begins
        batch = queue.next_batch("m", 0, now)
        finish(queue, batch, now + 2.0)
        now += 2.5
    assert queue.throughput.rates["m"] == pytest.approx((5 + 4 + 4) / 3)


def test_no_more_is_promised_than_a_varying_speed_allows() -> None:
    throughput = Throughput()
    assert throughput.sure("m") is None
    for _ in range(20):
        throughput.observe("m", 10.0)
    assert throughput.sure("m") == pytest.approx(9.0)
    for _ in range(3):  # the load comes: a fifth is lost
        throughput.observe("m", 8.0)
    assert (throughput.sure("m") or 0) < 8.0 < throughput.rates["m"]
    for _ in range(20):
        throughput.observe("m", 8.0)
    assert throughput.sure("m") == pytest.approx(0.9 * 8.0, rel=0.01)
    draw = random.Random(0)
    for _ in range(50):
        throughput.observe("m", draw.uniform(6.0, 10.0))
    assert (throughput.sure("m") or 0) == pytest.approx(6.0, rel=0.15)


def test_a_slow_first_batch_makes_those_after_it_no_less_sure() -> None:
    """It allocates, and is often a single image: clients that wait then would be refused."""
    throughput = Throughput()
    throughput.observe("m", 1.0)
    for _ in range(2):
        throughput.observe("m", 10.0)
    assert throughput.sure("m") == pytest.approx(0.9 * 7.0)
    for _ in range(20):
        throughput.observe("m", 10.0)
    assert throughput.sure("m") == pytest.approx(9.0, rel=0.05)


def test_images_that_are_lost_twice_fail() -> None:
    queue = scheduler()
    submit(queue, "a", image_request(2))
    queue.next_batch("m", 0, 0.0)
    assert queue.replica_lost(0, 1.0) == ()
    first = queue.next_batch("m", 1, 1.0)
    assert jobs(first) == ["a"]
    assert isinstance(finish(queue, first, 2.0)[0], ImageDone)
    assert jobs(queue.next_batch("m", 1, 2.0)) == ["a"]
    (change,) = queue.replica_lost(1, 3.0)
    assert isinstance(change.event, Failed) and change.event.code == "worker_lost"
    assert (queue.waiting, queue.running, queue.permits) == (0, 0, 0)


def test_progress_counts_all_images() -> None:
    queue = scheduler(Limits(max_batch=2))
    submit(queue, "a", image_request(4))
    batch = queue.next_batch("m", 0, 0.0)
    assert batch is not None
    seen = []
    for step in range(1, 11):
        (change,) = queue.stepped(batch.id, step, 10, float(step))
        assert isinstance(change.event, Stepped) and change.event.images == (0, 1)
        seen.append(change.event.progress)
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] < 0.5
    finish(queue, batch, 11.0)
    other = queue.next_batch("m", 0, 11.0)
    assert other is not None
    (change,) = queue.stepped(other.id, 1, 10, 12.0)
    assert isinstance(change.event, Stepped) and change.event.progress > 0.5


@pytest.mark.parametrize(("wanted", "beside"), [(0, 3), (1, 3), (2, 2), (3, 0), (3, 9)])
def test_a_job_gets_as_many_previews_as_it_wants(wanted: int, beside: int) -> None:
    queue = scheduler()
    for name, previews in (("a", wanted), ("b", beside)):
        submit(queue, name, replace(image_request(1, steps=12), previews=previews))
    batch = queue.next_batch("m", 0, 0.0)
    assert batch is not None and batch.previews == max(wanted, beside)
    shown = {"a": 0, "b": 0}
    for step in range(1, 13):
        changes = queue.stepped(batch.id, step, 12, 0.0, [np.zeros((2, 2, 3), np.uint8)] * 2)
        for change in changes:
            assert isinstance(change.event, Stepped)
            shown[change.job] += len(change.event.previews)
    assert shown == {"a": wanted, "b": beside}


def test_what_waits_for_a_model_that_never_comes_ends() -> None:
    queue = scheduler()
    submit(queue, "a", image_request(2))
    submit(queue, "b", image_request(1, model="other"))
    error = Failed("model_unavailable", "no memory")
    assert [(c.job, c.event) for c in queue.unavailable("m", error, 1.0)] == [("a", error)]
    assert queue.jobs == 1


def test_positions_count_those_who_came_before() -> None:
    queue = scheduler(Limits(max_batch=1))
    for now, name in enumerate("abc"):
        submit(queue, name, image_request(1), now=float(now))
    assert [queue.position(name) for name in "abc"] == [0, 1, 2]
    queue.next_batch("m", 0, 3.0)
    assert [queue.position(name) for name in "abcx"] == [None, 0, 1, None]


@pytest.mark.parametrize(
    "wrong", [{"queue_seconds": -1}, {"queue_jobs": 0}, {"max_batch": "2"}, {"aging_seconds": 1e9}]
)
def test_limits_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]
