"""Jobs: their states by their events, and how long results are kept."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Handmade

from latentforge.runtime.manifest import Manifest
from latentforge.serve.errors import DeadlineError, ExpiredJobError, UnknownJobError, job_error
from latentforge.serve.job import (
    Cancelled,
    Completed,
    Failed,
    ImageDone,
    Job,
    JobEvent,
    JobState,
    JobStore,
    Queued,
    Started,
    Stepped,
)
from latentforge.serve.request import ImageRequest

PIXELS = np.zeros((32, 48, 3), np.uint8)


@pytest.fixture
def request_of_two(handmade: object) -> ImageRequest:
    assert callable(handmade)
    directory = handmade()
    assert isinstance(directory, Path)
    return ImageRequest.of("m", Manifest.read(directory), "a red apple", count=2)


def job(request: ImageRequest, id: str, *events: JobEvent, now: float = 0.0) -> Job:
    made = Job(id=id, request=request, owner="me", created=0.0)
    for event in events:
        made = made.after(event, now)
    return made


def test_events_change_the_state(request_of_two: ImageRequest) -> None:
    preview = {0: PIXELS[:4, :4]}
    events: list[tuple[JobEvent, JobState, float]] = [
        (Queued(3), JobState.QUEUED, 0.0),
        (Started(), JobState.RUNNING, 0.0),
        (Stepped(images=(0, 1), step=1, count=2, progress=0.5), JobState.RUNNING, 0.5),
        (
            Stepped(images=(0, 1), step=2, count=2, progress=0.9, previews=preview),
            JobState.RUNNING,
            0.9,
        ),
        (ImageDone(1, PIXELS), JobState.RUNNING, 0.9),
        (ImageDone(0, PIXELS), JobState.RUNNING, 0.9),
        (Completed(), JobState.COMPLETED, 1.0),
    ]
    made = job(request_of_two, "a")
    for event, state, progress in events:
        made = made.after(event, 5.0)
        assert (made.state, made.progress) == (state, progress)
    assert (made.started, made.ended, made.state.ended) == (5.0, 5.0, True)
    assert 2 * PIXELS.nbytes < made.bytes < 2 * PIXELS.nbytes + 10_000


@pytest.mark.parametrize("end", [Completed(), Failed("generation_failed", "NaN"), Cancelled("me")])
def test_a_replay_leads_to_the_same_state(request_of_two: ImageRequest, end: JobEvent) -> None:
    shown = Stepped(images=(0,), step=1, count=4, progress=0.1, previews={0: PIXELS})
    later = Stepped(images=(1,), step=1, count=4, progress=0.2)
    events = (Queued(0), Started(), shown, later, ImageDone(1, PIXELS))
    running = job(request_of_two, "a", *events)
    again = job(request_of_two, "a", *running.replay())
    assert again.step is not None and again.step.previews.keys() == {0}
    assert (again.progress, again.images.keys()) == (0.2, {1})
    ended = running.after(end, 1.0)
    assert list(ended.replay())[-1] == end
    assert job(request_of_two, "a", *ended.replay()).state == ended.state
    assert list(job(request_of_two, "a", Queued(2)).replay()) == [Queued(2)]


def test_results_are_kept_for_a_time(request_of_two: ImageRequest) -> None:
    store = JobStore(seconds=10)
    store.put(job(request_of_two, "running"), 0)
    store.put(job(request_of_two, "ended", Completed(), now=0.0), 0)
    assert store.get("ended", 9.9).state is JobState.COMPLETED
    with pytest.raises(ExpiredJobError, match="kept for 10 seconds"):
        store.get("ended", 10.0)
    with pytest.raises(UnknownJobError, match="no such job"):
        store.get("other", 10.0)
    assert store.get("running", 1e9).id == "running"
    assert [kept.id for kept in store.running()] == ["running"] and len(store) == 1


def test_the_oldest_results_give_way_and_the_last_stays(request_of_two: ImageRequest) -> None:
    size = job(request_of_two, "a", ImageDone(0, PIXELS)).bytes
    store = JobStore(bytes=2 * size, expired=2)
    for name in "abcdef":
        store.put(job(request_of_two, name, ImageDone(0, PIXELS)), 0)
        store.put(job(request_of_two, name, ImageDone(0, PIXELS), Completed()), 0)
    assert len(store) == 2 and store.bytes == 2 * size and store.forgotten == 4
    with pytest.raises(ExpiredJobError):
        store.get("d", 0)
    with pytest.raises(UnknownJobError):  # the store remembers two
        store.get("a", 0)
    small = JobStore(bytes=1)
    small.put(job(request_of_two, "big", ImageDone(0, PIXELS), Completed()), 0)
    assert small.get("big", 0).images


def test_jobs_without_pictures_count_too(handmade: Handmade) -> None:
    """Else those that fail or are cancelled could fill the memory with their texts."""
    manifest, store = Manifest.read(handmade()), JobStore(bytes=1 << 20)
    long = ImageRequest.of("m", manifest, "a" * 16_000, count=10, negative_prompt="b" * 16_000)
    for number in range(100):
        store.put(job(long, str(number), Cancelled("by the client")), 0)
    assert len(store) == (1 << 20) // store.get("99", 0).bytes and store.bytes <= 1 << 20
    assert 32_000 < store.get("99", 0).bytes < 40_000


def test_the_code_of_a_failed_job_names_its_error() -> None:
    error = job_error("deadline_exceeded", "late")
    assert isinstance(error, DeadlineError) and (error.status, str(error)) == (504, "late")
    assert job_error("unheard of", "x").status == 500
