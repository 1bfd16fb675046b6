"""Random lives of a scheduler in virtual time, beside a model of what must hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulation import PIXEL, image_request

from latentforge.serve.errors import DrainingError, QueueFullError, QuotaError
from latentforge.serve.job import Cancelled, Completed, Failed, ImageDone, Stepped
from latentforge.serve.request import Batch, ImageRequest
from latentforge.serve.scheduler import BatchGains, JobChange, Limits, OwnerLimits, Scheduler

REPLICAS = {0: "m", 1: "m", 2: "n"}
GAINS = BatchGains().measured("m", 512, 512, {1: 1.0, 2: 1.5, 4: 2.5, 8: 2.6})
LARGEST = {"m": 4, "n": 1}
OWNERS = {"single": OwnerLimits(concurrent=1), "three": OwnerLimits(queued=3)}
KINDS: list[dict[str, int]] = [{}, {"steps": 4}, {"height": 1024, "width": 1024}]


@dataclass
class Life:
    """Job as its client sees it."""

    request: ImageRequest
    owner: str
    deadline: float | None
    poisoned: bool
    done: set[int] = field(default_factory=set)
    losses: Counter[int] = field(default_factory=Counter)
    end: object = None


class Lives(RuleBasedStateMachine):
    """Clients and replicas that do what they like, in any order."""

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(queue_jobs=12, queue_seconds=300, max_batch=4, aging_seconds=20)
        self.scheduler = Scheduler(limits, GAINS, OWNERS)
        self.now = 0.0
        self.lives: dict[str, Life] = {}
        self.batches: dict[int, tuple[int, Batch, int]] = {}
        self.alone: set[tuple[str, int]] = set()
        self.refused = 0

    # clients

    @rule(
        kind=st.sampled_from(KINDS),
        model=st.sampled_from(["m", "m", "n"]),
        images=st.integers(1, 6),
        owner=st.sampled_from(["one", "single", "three"]),
        seconds=st.none() | st.integers(1, 60),
        poisoned=st.integers(0, 5).map(lambda number: number == 0),
    )
    def submit(
        self,
        kind: dict[str, int],
        model: str,
        images: int,
        owner: str,
        seconds: int | None,
        poisoned: bool,
    ) -> None:
        job = f"job{len(self.lives) + self.refused}"
        request = image_request(images, model, **kind)
        deadline = None if seconds is None else self.now + seconds
        try:
            changes = self.scheduler.submit(
                job, request, owner=owner, deadline=deadline, now=self.now
            )
        except (QueueFullError, QuotaError) as error:
            self.refused += 1
            assert error.retry_after is not None and error.retry_after > 0
            return
        self.lives[job] = Life(request, owner, deadline, poisoned)
        assert [change.job for change in changes] == [job]

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), often=st.integers(0, 3))
    def cancel(self, data: st.DataObject, often: int) -> None:
        if often:
            return
        job = data.draw(st.sampled_from(sorted(self.lives)))
        ended = self.lives[job].end is not None
        changes = self.scheduler.cancel(job, "client", self.now)
        assert bool(changes) != ended
        self.note(changes)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        wake = self.scheduler.wake_at(self.now)
        deadlines = [life.deadline for life in self.open() if life.deadline is not None]
        assert wake == (max(self.now, min(deadlines)) if deadlines else None)
        self.now += seconds
        self.note(self.scheduler.expire(self.now))
        assert all(life.deadline is None or life.deadline > self.now for life in self.open())

    # replicas

    @rule()
    def start(self) -> None:
        for replica in REPLICAS:
            self.start_next(replica)

    def start_next(self, replica: int) -> None:
        before = [batch for where, batch, _ in self.batches.values() if where == replica]
        batch = self.scheduler.next_batch(REPLICAS[replica], replica, self.now)
        if batch is None:
            return
        assert len(before) < 2 and batch.id not in self.batches
        self.check_batch(batch, before)
        self.batches[batch.id] = (replica, batch, 0)

    def check_batch(self, batch: Batch, before: list[Batch]) -> None:
        assert 1 <= len(batch.rows) <= LARGEST[batch.model] or batch.key.settings.height > 512
        assert len(batch.rows) <= 4
        for row in batch.rows:
            life = self.lives[row.job]
            assert life.end is None and row.index not in life.done
            assert life.request.key == batch.key
            assert row.seed == life.request.settings.seeds[row.index]
            assert (row.job, row.index) not in self.alone or len(batch.rows) == 1
        lonely = [
            row for b in (batch, *before) for row in b.rows if (row.job, row.index) in self.alone
        ]
        assert not before or not lonely
        for other in before:
            assert batch.key.row_cost <= other.key.row_cost / 2

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        replica, batch, step = self.batches[data.draw(st.sampled_from(sorted(self.batches)))]
        steps = batch.settings.steps
        if step == steps:
            return
        self.batches[batch.id] = (replica, batch, step + 1)
        previews = [PIXEL] * len(batch.rows)
        self.note(self.scheduler.stepped(batch.id, step + 1, steps, self.now, previews))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Let a batch end; in an error if one of its rows is poisoned."""
        self.end(data.draw(st.sampled_from(sorted(self.batches))))

    def end(self, number: int) -> None:
        _, batch, _ = self.batches.pop(number)
        if any(self.lives[row.job].poisoned for row in batch.rows):
            changes = self.scheduler.failed(batch.id, "NaN", self.now)
            assert not changes or len(batch.rows) == 1
            self.retry(batch)
            self.note(changes)
        else:
            images = [PIXEL] * len(batch.rows)
            self.note(self.scheduler.finished(batch.id, images, self.now))

    def retry(self, batch: Batch) -> None:
        for row in batch.rows:
            if self.lives[row.job].end is None:
                self.alone.add((row.job, row.index))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        replica = self.batches[data.draw(st.sampled_from(sorted(self.batches)))][0]
        lost = [batch for where, batch, _ in self.batches.values() if where == replica]
        for batch in lost:
            del self.batches[batch.id]
            for row in batch.rows:
                self.lives[row.job].losses[row.index] += 1
            self.retry(batch)
        self.note(self.scheduler.replica_lost(replica, self.now))
        twice = [life for life in self.open() if max(life.losses.values(), default=0) > 1]
        assert not twice

    @rule()
    def stop(self) -> None:
        """Let replicas give up what runs for nobody."""
        self.stop_idle()

    def stop_idle(self) -> None:
        for replica, batch in self.scheduler.stops():
            assert self.batches[batch][0] == replica
            assert all(self.lives[row.job].end is not None for row in self.batches[batch][1].rows)
            self.scheduler.stopped(batch, self.now)
            del self.batches[batch]

    # what must hold

    def open(self) -> list[Life]:
        return [life for life in self.lives.values() if life.end is None]

    def note(self, changes: Iterable[JobChange]) -> None:
        for change in changes:
            life, event = self.lives[change.job], change.event
            assert life.end is None, "an event after the end"
            if isinstance(event, ImageDone):
                assert event.index not in life.done
                life.done.add(event.index)
            if isinstance(event, Stepped):
                assert 0 < event.progress < 1 and not event.previews
            if isinstance(event, Completed):
                assert len(life.done) == life.request.count
            if isinstance(event, Failed):
                self.check_failure(life, event)
            if isinstance(event, Completed | Failed | Cancelled):
                life.end = event

    def check_failure(self, life: Life, event: Failed) -> None:
        if event.code == "generation_failed":
            assert life.poisoned
        if event.code == "worker_lost":
            assert max(life.losses.values()) == 2
        if event.code == "deadline_exceeded":
            assert life.deadline is not None and life.deadline <= self.now

    @invariant()
    def every_image_is_in_one_place(self) -> None:
        rows = [(row.job, row.index) for _, batch, _ in self.batches.values() for row in batch.rows]
        assert len(rows) == len(set(rows))
        live = [row for row in rows if self.lives[row[0]].end is None]
        scheduler = self.scheduler
        assert scheduler.running == len(live)
        missing = sum(life.request.count - len(life.done) for life in self.open())
        assert scheduler.waiting + scheduler.running == missing
        assert scheduler.permits == len(self.batches)
        assert scheduler.jobs == len(self.open())
        assert scheduler.waiting == scheduler.depth("m") + scheduler.depth("n")

    @invariant()
    def owners_stay_in_their_limits(self) -> None:
        live = {row.job for _, batch, _ in self.batches.values() for row in batch.rows}
        jobs = [job for job in live if self.lives[job].end is None]
        assert sum(self.lives[job].owner == "single" for job in jobs) <= 1

    def teardown(self) -> None:
        """Let the server drain: what was accepted ends, and nothing is left."""
        self.scheduler.drain()
        with pytest.raises(DrainingError):
            self.scheduler.submit("late", image_request(), owner="one", deadline=None, now=self.now)
        for _ in range(1000):
            if not self.scheduler.jobs and not self.batches:
                break
            self.stop_idle()
            for replica in REPLICAS:
                self.start_next(replica)
            for batch in sorted(self.batches):
                self.end(batch)
        self.every_image_is_in_one_place()
        assert not self.open()
        scheduler = self.scheduler
        assert (scheduler.waiting, scheduler.running, scheduler.permits) == (0, 0, 0)
        assert scheduler.expected_wait("m") in (None, 0)


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_lives() -> None:
    run(20, 50)


@pytest.mark.slow
def test_ten_thousand_steps() -> None:
    run(100, 100)
