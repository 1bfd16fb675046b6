"""Service with real worker processes: accepted requests end, whatever happens to the workers."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Handmade, handmade_engines
from test_image_conditioning import DEPTH, TEXT
from test_loop import NETWORKS
from test_tasks import ENCODER
from test_worker import FAULTY, QUICK

from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Conditioning
from latentforge.runtime.tensor import TensorSpec
from latentforge.serve.errors import (
    DrainingError,
    ModelUnavailableError,
    QuotaError,
    ReusedKeyError,
    UnknownJobError,
)
from latentforge.serve.job import (
    Cancelled,
    Completed,
    Failed,
    ImageDone,
    Job,
    JobEvent,
    JobState,
    Queued,
    Started,
    Stepped,
)
from latentforge.serve.keys import ApiKey, KeyRing
from latentforge.serve.request import ImageRequest
from latentforge.serve.scheduler import BatchGains, Limits
from latentforge.serve.service import ModelSource, Service, ServiceOptions
from latentforge.serve.worker.replica import WorkerLimits

pytest.importorskip("onnxruntime")

FOURS = BatchGains().measured("m", 32, 48, {1: 1.0, 2: 1.9, 4: 3.5})


@asynccontextmanager
async def running(directory: Path, replicas: int = 1, **options: Any) -> AsyncIterator[Service]:
    source = ModelSource(name="m", directory=directory, replicas=replicas, options={"threads": 1})
    given = {"options": ServiceOptions(worker=QUICK), "gains": FOURS, **options}
    service = Service([source], **given)
    await service.start()
    try:
        yield service
        scheduler = service.scheduler
        while scheduler.permits:
            await asyncio.sleep(0.01)
        assert (scheduler.waiting, scheduler.running, scheduler.jobs) == (0, 0, 0)
    finally:
        await service.close()


async def submit(service: Service, prompt: str = "a", count: int = 1, **options: Any) -> Job:
    submission = {
        name: options.pop(name) for name in ("owner", "deadline", "idempotency") if name in options
    }
    request = ImageRequest.of("m", service.models["m"].manifest, prompt, count=count, **options)
    return await service.submit(request, **{"owner": "me", **submission})


async def ended(service: Service, job: Job) -> Job:
    async for _ in service.events(job.id):
        pass
    return service.get(job.id)


async def stepping(service: Service, job: Job) -> None:
    """Wait for a further step of a job."""
    seen = service.get(job.id).step
    async for event in service.events(job.id):
        if isinstance(event, Stepped) and (seen is None or event.previews is not seen.previews):
            return


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(program, 100))


def value(service: Service, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(f"latentforge_{name}", labels) or 0.0


def pids(service: Service) -> list[int]:
    return [replica.pid or 0 for replica in service.models["m"].replicas]


def signals(service: Service, number: int) -> Callable[[], None]:
    return lambda: [os.kill(pid, number) for pid in pids(service) if pid] and None  # type: ignore[func-returns-value]


def mixed(count: int) -> list[dict[str, Any]]:
    """Random requests of a few kinds, so that they share batches in many ways."""
    draw = random.Random(7)
    rng = np.random.default_rng(7)
    mask = np.zeros((32, 48), np.uint8)
    mask[8:, 16:] = 255
    kinds: list[dict[str, Any]] = [
        {},
        {"negative_prompt": "red"},
        {"guidance_scale": 1.0, "sampler": "euler_ancestral", "steps": 3},
        {"sampler": "dpmpp_2m", "steps": 5, "height": 48},
        {"image": True},
        {"image": True, "mask": mask, "sampler": "ddpm"},
    ]
    requests = []
    for _ in range(count):
        request = {**draw.choice(kinds), "seed": draw.randrange(1000), "count": draw.choice((1, 3))}
        if "image" in request:
            request["image"] = rng.integers(0, 256, (32, 48, 3), np.uint8)
        if "negative_prompt" in request:
            request["negative_prompt"] = draw.choice(["red", "an apple"])
        requests.append({"prompt": draw.choice(["a red apple", "a", "red", "apple"]), **request})
    return requests


def test_images_are_those_of_the_pipeline(handmade: Handmade) -> None:
    """Requests of different prompts and seeds share batches, and each gets its own images."""
    directory, requests = handmade(onnx={**NETWORKS, "vae_encoder": ENCODER}), mixed(30)

    async def scenario() -> None:
        async with running(directory) as service:
            jobs = [await submit(service, **request) for request in requests]
            events: list[JobEvent] = [event async for event in service.events(jobs[-1].id)]
            done = [await ended(service, job) for job in jobs]
            assert {job.state for job in done} == {JobState.COMPLETED}
            with load(directory, threads=1) as pipe:
                for job, request in zip(done, requests, strict=True):
                    alone = {**request, "seed": 0}
                    for index in range(alone.pop("count")):
                        alone["seed"] = request["seed"] + index
                        image = np.asarray(pipe(**alone).images[0])
                        assert np.array_equal(job.images[index], image), request
                    assert job.images[index].base is None  # it keeps no other image alive
            kinds = [type(event) for event in events]
            assert kinds[0] is Queued and kinds[-1] is Completed
            assert Started in kinds and Stepped in kinds and ImageDone in kinds
            progress = [event.progress for event in events if isinstance(event, Stepped)]
            assert progress == sorted(progress) and done[0].progress == 1.0
            images = sum(request["count"] for request in requests)
            assert value(service, "images_total", model="m") == images
            assert value(service, "jobs_total", model="m", end="completed") == 30
            assert value(service, "batch_size_sum", model="m") == images
            assert value(service, "batch_size_count", model="m") < images / 2
            assert value(service, "model_loaded", model="m", digest=service.models["m"].digest)

    run(scenario())


def depth_engines(folder: Path) -> Path:
    """Write engines that take a depth map."""
    sample = TensorSpec("float32", ("batch", 5, "latent_height", "latent_width"))
    return handmade_engines(
        folder,
        onnx={**NETWORKS, "denoiser": DEPTH, "vae_encoder": ENCODER},
        inputs={"sample": sample},
        conditioning=Conditioning(encoders=TEXT, channels=("depth",)),
    )


def test_requests_of_a_batch_have_their_own_depth_maps(tmp_path: Path) -> None:
    """And a model that takes depth maps is measured with them."""
    directory, rng = depth_engines(tmp_path), np.random.default_rng(3)
    requests = [
        {
            "image": rng.integers(0, 256, (32, 48, 3), np.uint8),
            "depth_map": rng.uniform(0, 9, (1, 40, 50)),
            "seed": seed,
        }
        for seed in range(6)
    ]

    async def scenario() -> None:
        options = ServiceOptions(worker=QUICK, measure_seconds=0.2)
        async with running(directory, options=options) as service:
            assert 1 in service.scheduler.gains.rates["m", 32, 48]
            service.scheduler.gains = FOURS
            jobs = [await submit(service, **request) for request in requests]
            done = [await ended(service, job) for job in jobs]
            with load(directory, threads=1) as pipe:
                expected = [np.asarray(pipe("a", **request).images[0]) for request in requests]
            for job, image in zip(done, expected, strict=True):
                assert np.array_equal(job.images[0], image)
            assert value(service, "batch_size_count", model="m") < len(requests)
            assert not np.array_equal(expected[0], expected[1])
            with pytest.raises(SettingsError, match="needs a depth map"):
                await submit(service, image=requests[0]["image"])

    run(scenario())


def test_a_running_job_is_cancelled_between_steps(handmade: Handmade) -> None:
    """By its client, by its deadline, and before its first step; others run on."""
    directory = handmade(onnx=NETWORKS)
    long = {"count": 10, "steps": 900, "height": 512, "width": 512}  # 2 s, on a fast machine

    async def scenario() -> None:
        async with running(directory) as service:
            first = await submit(service, **long)
            await stepping(service, first)
            short = await submit(service, "red")
            assert (await ended(service, short)).state is JobState.COMPLETED
            assert service.get(first.id).state is JobState.RUNNING  # the short one ran beside
            assert service.cancel(first.id) and not service.cancel(first.id)
            assert service.get(first.id).end == Cancelled("cancelled by the client")
            late = await ended(service, await submit(service, **long, deadline=0.1))
            assert isinstance(late.end, Failed) and late.end.code == "deadline_exceeded"
            at_once = await submit(service, **long)
            service.cancel(at_once.id)
            assert (await ended(service, await submit(service))).state is JobState.COMPLETED
            with pytest.raises(UnknownJobError):
                service.cancel("unheard of")
            assert value(service, "cancelled_total", stage="running") == 1
            assert value(service, "cancelled_total", stage="queued") == 1
            assert value(service, "wasted_steps_total", model="m") < 900  # none went on to its end

    run(scenario())


def test_jobs_survive_the_loss_of_their_worker(handmade: Handmade) -> None:
    """Killed, and then hung; the second loss is the end of a job, and of no other."""
    directory = handmade(onnx=NETWORKS)
    limits = WorkerLimits(step=1.0, ping=0.05, first_pause=0.05, longest_pause=0.1)

    async def scenario() -> None:
        async with running(directory, options=ServiceOptions(worker=limits)) as service:
            doomed = await submit(service, steps=999, height=2048, width=2048)
            await stepping(service, doomed)
            beside = [await submit(service, "red", 2, steps=99) for _ in range(2)]
            await stepping(service, beside[0])
            signals(service, signal.SIGKILL)()
            done = [await ended(service, job) for job in beside]
            assert [job.state for job in done] == [JobState.COMPLETED] * 2
            assert len(done[0].images) == 2
            await stepping(service, doomed)
            signals(service, signal.SIGSTOP)()
            end = (await ended(service, doomed)).end
            assert isinstance(end, Failed) and end.code == "worker_lost"
            while value(service, "worker_restarts_total", model="m") < 2:
                await asyncio.sleep(0.01)
            assert (await ended(service, await submit(service))).state is JobState.COMPLETED

    run(scenario())


def test_a_poisoned_request_fails_alone(handmade: Handmade) -> None:
    directory = handmade(onnx={**NETWORKS, "denoiser": FAULTY})

    async def scenario() -> None:
        async with running(directory) as service:
            prompts = ["a", "red", "a", "apple", "a"]
            keys = [(str(number), prompt) for number, prompt in enumerate(prompts)]
            jobs = [await submit(service, key[1], idempotency=key) for key in keys]
            done = [await ended(service, job) for job in jobs]
            codes = [job.end.code if isinstance(job.end, Failed) else "" for job in done]
            assert codes == ["", "generation_failed", "", "out_of_memory", ""]
            again = [await submit(service, key[1], idempotency=key) for key in keys]
            kept = [new.id == old.id for new, old in zip(again, jobs, strict=True)]
            assert kept == [not code for code in codes]  # what failed is tried once more
            ends = [type((await ended(service, job)).end) for job in again]
            assert ends == [Failed if code else Completed for code in codes]
            assert pids(service) and service.models["m"].replicas[0].losses == 0

    run(scenario())


def test_a_drain_loses_nothing(handmade: Handmade) -> None:
    directory = handmade(onnx=NETWORKS)

    async def scenario() -> None:
        async with running(directory, replicas=2) as service:
            jobs = [await submit(service, steps=20 + index) for index in range(12)]
            draining = asyncio.create_task(service.drain(30))
            await asyncio.sleep(0)
            assert service.draining
            with pytest.raises(DrainingError) as refused:
                await submit(service)
            assert refused.value.retry_after
            await draining
            assert {service.get(job.id).state for job in jobs} == {JobState.COMPLETED}
            assert value(service, "rejected_total", reason="drain") == 1
        async with running(directory) as service:
            endless = await submit(service, count=10, steps=900, height=256, width=256)
            await stepping(service, endless)
            await service.drain(0.05)
            assert isinstance(service.get(endless.id).end, Cancelled)

    run(scenario())


def test_a_repeated_request_gets_the_same_job(handmade: Handmade) -> None:
    """And owners have limits; both without a worker, since nothing runs yet."""
    key = ApiKey(sha256="0" * 64, queued=2, rate=1.0, burst=2.0)

    async def scenario() -> None:
        source = ModelSource(name="m", directory=handmade())
        service = Service([source], ring=KeyRing({"me": key}))
        first = await submit(service, idempotency=("k", "body"))
        again = await submit(service, idempotency=("k", "body"))
        assert again.id == first.id
        with pytest.raises(ReusedKeyError):
            await submit(service, idempotency=("k", "other"))
        other = await submit(service, owner="other", idempotency=("k", "other"))
        assert other.id != first.id and service.get(other.id).position == 1
        await submit(service)
        with pytest.raises(QuotaError, match="may"):
            await submit(service)
        assert value(service, "rejected_total", reason="quota") == 1
        assert value(service, "waiting", model="m") == 3
        await service.close()
        assert service.get(first.id).end == Cancelled("the server shuts down")

    run(scenario())


def test_a_slow_reader_misses_steps_and_nothing_else(handmade: Handmade) -> None:
    async def scenario() -> None:
        source = ModelSource(name="m", directory=handmade())
        service = Service([source])
        job = await submit(service, "a", 2, previews=3, steps=9)
        batch = service.scheduler.next_batch("m", 0, 0.0)
        assert batch is not None
        reader = service.events(job.id)
        assert await anext(reader) == Queued(0)
        service._publish(job.id, Started())
        for step in range(1, 10):
            picture = np.full((1, 4, 4, 3), step, np.uint8)
            service._apply(service.scheduler.stepped(batch.id, step, 9, 0.0, tuple(picture)))
        service._apply(service.scheduler.finished(batch.id, tuple(picture), 1.0))
        rest = service.scheduler.next_batch("m", 0, 0.0)
        assert rest is not None
        service._apply(service.scheduler.finished(rest.id, tuple(picture), 1.0))
        events = [event async for event in reader]
        kinds = [type(event) for event in events]
        assert kinds == [Started, Stepped, ImageDone, ImageDone, Completed]
        assert isinstance(events[1], Stepped) and events[1].previews[0][0, 0, 0] == 7
        assert value(service, "preview_dropped_total") == 2
        again = [type(event) async for event in service.events(job.id)]
        assert again == [Started, ImageDone, ImageDone, Completed]
        assert not service._readers
        await service.close()

    run(scenario())


def test_a_model_that_does_not_come_back_is_unavailable(handmade: Handmade) -> None:
    directory = handmade(onnx=NETWORKS)
    options = ServiceOptions(worker=QUICK, unavailable_seconds=0.2, limits=Limits())

    async def scenario() -> None:
        async with running(directory, options=options) as service:
            waiting = await submit(service, count=10, steps=900, height=256, width=256)
            await stepping(service, waiting)
            for path in directory.glob("*.onnx"):
                path.unlink()
            signals(service, signal.SIGKILL)()
            end = (await ended(service, waiting)).end
            assert isinstance(end, Failed) and end.code == "model_unavailable"
            with pytest.raises(
                ModelUnavailableError, match="m does not run: its process ended"
            ) as refused:
                await submit(service)
            assert refused.value.retry_after and not service.models["m"].ready
            assert value(service, "rejected_total", reason="unavailable") == 1

    run(scenario())


def test_engines_that_do_not_load_end_the_start(handmade: Handmade) -> None:
    directory = handmade(onnx=NETWORKS)
    (directory / "denoiser.onnx").write_bytes((directory / "denoiser.onnx").read_bytes()[::-1])

    async def scenario() -> None:
        with pytest.raises(ManifestError, match="denoiser.onnx"):
            async with running(directory):
                pass

    run(scenario())


def test_a_model_is_ready_once_its_batches_are_measured(handmade: Handmade) -> None:
    """Requests are accepted before, and wait."""
    source = ModelSource(name="m", directory=handmade(onnx=NETWORKS), options={"threads": 1})
    options = ServiceOptions(worker=QUICK, measure_seconds=0.5)

    async def scenario() -> None:
        service = Service([source], options=options)
        starting, model = asyncio.create_task(service.start()), service.models["m"]
        while not model.loaded:
            await asyncio.sleep(0.001)
        early = await submit(service)
        assert not model.ready and not starting.done()
        await starting
        assert model.ready and service.scheduler.gains.rates["m", 32, 48]
        assert (await ended(service, early)).state is JobState.COMPLETED
        await service.close()

    run(scenario())


def test_results_are_forgotten_without_a_request(handmade: Handmade) -> None:
    """And the system has their memory again."""
    options = ServiceOptions(worker=QUICK, result_seconds=1.0)

    async def settled(service: Service, limit: float = float("inf")) -> int:
        """Return the memory once nothing is kept, and no more than a limit is held."""
        end = time.monotonic() + 20
        while service._store.bytes or (held := memory()) > limit:
            assert time.monotonic() < end, (service._store.bytes, memory(), limit)
            await asyncio.sleep(0.05)
        return held

    async def scenario() -> None:
        async with running(handmade(), options=options) as service:
            size = {"count": 8, "steps": 1, "height": 1024, "width": 1024}
            await ended(service, await submit(service, **size))
            await settled(service)
            await asyncio.sleep(1.0)  # until the memory is returned
            first = memory()
            await ended(service, await submit(service, **size))
            assert service._store.bytes > 24_000_000 and memory() > first + 12_000_000
            await settled(service, first + 4_000_000)

    run(scenario())


def test_models_have_names_of_their_own(handmade: Handmade) -> None:
    source = ModelSource(name="m", directory=handmade())
    with pytest.raises(SettingsError, match="two models are named m"):
        Service([source, source])
    with pytest.raises(SettingsError, match="no model"):
        Service([])


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_five_thousand_requests_leave_nothing_behind(handmade: Handmade) -> None:
    """A quarter of them is cancelled, a tenth repeated, and every worker is lost now and then."""
    draw, sizes, ends = random.Random(1), list[int](), Counter[str]()

    async def client(service: Service, number: int) -> None:
        key = (f"key{number % 900}", "body") if number % 10 == 0 else None
        job = await submit(service, "red", draw.choice((1, 2)), steps=3, idempotency=key)
        if draw.random() < 0.25:
            await asyncio.sleep(0)
            service.cancel(job.id)
        ends[(await ended(service, job)).state.value] += 1

    async def scenario() -> None:
        options = ServiceOptions(worker=QUICK, result_seconds=1, limits=Limits(queue_seconds=600))
        async with running(handmade(), options=options) as service:
            for round in range(50):
                if round % 10 == 9:
                    signals(service, signal.SIGKILL)()
                await asyncio.gather(*(client(service, round * 100 + i) for i in range(100)))
                sizes.append(memory())
            assert len(service._store) < 1000 and not service._readers
            assert not service._meter.accepted and not service._meter.stepped

    asyncio.run(asyncio.wait_for(scenario(), 280))
    assert sum(ends.values()) == 5000 and ends["failed"] == 0
    assert ends["cancelled"] > 500
    assert max(sizes[10:]) <= 1.02 * sizes[9], [size >> 20 for size in sizes]
