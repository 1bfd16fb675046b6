"""Worker processes: what they make, and how they are cancelled, lost, hung and ended."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Handmade
from test_loop import NETWORKS

from latentforge.runtime.errors import BackendError, ManifestError, SettingsError
from latentforge.runtime.isolation import child_environment
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest, PreviewMap
from latentforge.runtime.settings import Settings
from latentforge.serve.worker import batch_timing
from latentforge.serve.worker.batch_timing import measured_rates
from latentforge.serve.worker.messages import (
    BatchDone,
    BatchFailed,
    BatchStopped,
    FrameReader,
    Order,
    Ping,
    RawArray,
    RunBatch,
    StepDone,
    frame,
)
from latentforge.serve.worker.program import is_preview_due
from latentforge.serve.worker.replica import Replica, ReplicaLostError, ReplicaState, WorkerLimits

pytest.importorskip("onnxruntime")

QUICK = WorkerLimits(step=5.0, ping=0.05, first_pause=0.05, longest_pause=0.1)
PREVIEW = PreviewMap(
    weights=((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)),
    offset=(0.0, 0.0, 0.0),
    correlation=1.0,
)

# Prompts with "red" make NaN, and those with "apple" ask for terabytes.
FAULTY = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, h, w] out_sample)
<float red = {0.175}, float apple = {0.225}, float none = {0}, float many = {1e14},
 int64[1] one = {1}, int64[1] zero = {0}>
{
  last = ReduceMax<keepdims = 0>(encoder_hidden_states)
  over = Sub(last, apple)
  wanted = Relu(over)
  scaled = Mul(wanted, many)
  large = Cast<to = 7>(scaled)
  length = Add(large, one)
  filled = ConstantOfShape(length)
  taken = ReduceSum(filled, zero)
  below = Sub(red, last)
  root = Sqrt(below)
  nothing = Mul(root, none)
  sum = Add(nothing, taken)
  out_sample = Add(sample, sum)
}"""


def settings(*prompts: str, **changes: Any) -> Settings:
    given = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0, "guidance_rescale": 0.0}
    sizes = {"height": 32, "width": 48, "seed": tuple(range(len(prompts)))}
    return Settings(prompts=prompts, **{**given, **sizes, **changes})


@asynccontextmanager
async def started(directory: Path, **options: Any) -> AsyncIterator[Replica]:
    replica = Replica(directory, **{"limits": QUICK, "options": {"threads": 1}, **options})
    await replica.start()
    try:
        yield replica
    finally:
        await replica.close()


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(program, 60))


def test_a_worker_makes_the_images_of_the_runtime(
    handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs no file of the working directory, and leaves no process."""
    (tmp_path / "here").mkdir()
    for name in ("json", "msgspec", "numpy"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('taken from here')")
    directory = handmade(onnx=NETWORKS, preview=PREVIEW)
    monkeypatch.chdir(tmp_path / "here")
    wanted, steps = settings("a red apple", "a", guidance_scale=3.0), list[StepDone]()

    async def scenario() -> None:
        async with started(directory) as replica:
            pid = replica.pid
            end = await replica.run(RunBatch(batch=1, settings=wanted, previews=2), steps.append)
            assert isinstance(end, BatchDone) and replica.state is ReplicaState.READY
            with load(directory, threads=1) as pipe:
                expected = pipe.run(wanted)
                images = [step.quick_preview() for step in pipe.steps(wanted)]
            assert np.array_equal(end.images.array, np.stack(expected.images))
            assert len(end.stages["denoiser"]) == 4 and 0 < end.seconds < 10
            previews = {step.step: step.previews for step in steps}
            assert [step for step in previews if previews[step]] == [2, 3]
            assert np.array_equal(previews[2].array, np.stack(images[1]))  # type: ignore[union-attr]
            assert replica.silence < 5 and replica.loaded is not None
        assert pid is not None and not is_alive(pid) and replica.pid is None

    run(scenario())
    assert [(step.step, step.count) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_images_and_masks_reach_the_worker(handmade: Handmade) -> None:
    from test_tasks import ENCODER

    directory = handmade(onnx={**NETWORKS, "vae_encoder": ENCODER})
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 48, 3), np.uint8) for _ in range(2)]
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 255
    wanted = settings("a", "red", strength=0.5)

    async def scenario() -> None:
        async with started(directory) as replica:
            order = RunBatch(
                batch=1,
                settings=wanted,
                images=tuple(map(RawArray.of, images)),
                mask=RawArray.of(mask),
            )
            end = await replica.run(order, lambda _: None)
            assert isinstance(end, BatchDone)
            with load(directory, threads=1) as pipe:
                expected = pipe.run(wanted, image=images, mask=mask)
            assert np.array_equal(end.images.array, np.stack(expected.images))

    run(scenario())


def test_a_worker_lives_through_batches_that_fail_or_are_cancelled(handmade: Handmade) -> None:
    directory = handmade(onnx={**NETWORKS, "denoiser": FAULTY})

    async def scenario() -> None:
        async with started(directory) as replica:
            pid, ended = replica.pid, dict[int, Any]()

            async def end_of(batch: int, wanted: Settings) -> Any:
                def report(step: StepDone) -> None:
                    if batch == 5 and step.step > 1:
                        replica.cancel(batch)

                return await replica.run(RunBatch(batch=batch, settings=wanted), report)

            ended[1] = await end_of(1, settings("a", "red"))
            ended[2] = await end_of(2, settings("apple"))
            ended[3] = await end_of(3, settings("a", height=40))
            ended[4] = await end_of(4, settings("a", cached_steps=(1,)))
            ended[5] = await end_of(5, settings("a", steps=900))
            replica.cancel(5)
            ended[6] = await end_of(6, settings("a"))
            failed = [ended[key] for key in (1, 2, 3, 4)]
            assert all(isinstance(end, BatchFailed) for end in failed), failed
            assert [end.code for end in failed] == [
                "generation_failed", "out_of_memory", "invalid_value", "invalid_value",
            ]  # fmt: skip
            assert "NaN" in ended[1].message and "multiple of 16" in ended[3].message
            assert isinstance(ended[5], BatchStopped) and 2 <= ended[5].steps < 900
            assert isinstance(ended[6], BatchDone) and replica.pid == pid and not replica.losses

    run(scenario())


def test_a_lost_worker_is_started_again(handmade: Handmade) -> None:
    """Killed while it runs a batch and while it does not, hung, and abandoned by its task."""
    directory = handmade()  # which loads fastest
    short = WorkerLimits(step=0.4, ping=0.05, first_pause=0.05, longest_pause=0.1)
    endless = RunBatch(batch=1, settings=settings("a", steps=999, height=256, width=256))

    async def scenario() -> None:
        async with started(directory, limits=short) as replica:
            with pytest.raises(ReplicaLostError, match="killed by the system"):
                await replica.run(endless, lambda _: os.kill(replica.pid or 0, signal.SIGKILL))
            assert replica.losses == 0 or replica.state is not ReplicaState.READY
            await replica.ready()
            with pytest.raises(ReplicaLostError, match=r"did not answer for 0\.4 s"):
                await replica.run(endless, lambda _: os.kill(replica.pid or 0, signal.SIGSTOP))
            await replica.ready()
            os.kill(replica.pid or 0, signal.SIGSTOP)
            while replica.losses < 3:
                await asyncio.sleep(0.01)
            await replica.ready()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(replica.run(endless, lambda _: None), 0.05)
            with pytest.raises(ReplicaLostError, match="not ready"):
                await replica.run(endless, lambda _: None)
            await replica.ready()
            os.kill(replica.pid or 0, signal.SIGTERM)  # the server's to decide
            end = await replica.run(RunBatch(batch=2, settings=settings("a")), lambda _: None)
            assert isinstance(end, BatchDone) and replica.losses == 4

    run(scenario())


def test_batches_are_measured_once(
    handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has them for the next start; one that is damaged, or cannot be written, is none."""
    directory, cache = handmade(onnx=NETWORKS), tmp_path / "cache"
    manifest = Manifest.read(directory)
    monkeypatch.setenv("LATENTFORGE_CACHE", str(cache))

    async def scenario() -> None:
        async with started(directory) as replica:
            short = await measured_rates(replica, manifest, max_batch=4, seconds=1e-9)
            assert short.keys() == {1} and short[1] > 0
            monkeypatch.setattr(batch_timing, "_WORTH", 0.0)  # whatever this machine gains
            assert await measured_rates(replica, manifest, max_batch=4, seconds=9) == short
            (kept,) = (cache / "batches").iterdir()
            kept.write_text('{"1": -1}')
            rates = await measured_rates(replica, manifest, max_batch=4, seconds=9)
            assert rates.keys() == {1, 2, 4}
            again = await measured_rates(replica, manifest, max_batch=4, seconds=9)
            assert again == rates
            monkeypatch.setenv("LATENTFORGE_CACHE", str(kept))
            other = await measured_rates(replica, manifest, max_batch=3, seconds=9)
            assert other.keys() == {1, 2}

    run(scenario())


def test_closing_ends_a_batch_and_those_who_wait(handmade: Handmade) -> None:
    directory = handmade(onnx=NETWORKS)
    endless = RunBatch(batch=1, settings=settings("a", steps=999, height=2048, width=2048))

    async def scenario() -> None:
        async with started(directory) as replica:
            running = asyncio.create_task(replica.run(endless, lambda _: None))
            await asyncio.sleep(0.05)
        with pytest.raises(ReplicaLostError, match="shutting down"):
            await running
        with pytest.raises(ReplicaLostError, match="shutting down"):
            await replica.ready()

    run(scenario())


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def test_closing_waits_for_a_process_that_ends(handmade: Handmade) -> None:
    """A loss and a close in the same moment leave no process, and nothing that is open."""

    async def scenario() -> None:
        before = open_descriptors()
        async with started(handmade()) as replica:
            process, pid = replica._process, replica.pid
            assert process is not None and pid is not None
            os.kill(pid, signal.SIGKILL)
            while replica.state is not ReplicaState.LOST:
                await asyncio.sleep(0)
            assert not process.reason.done()
        assert process.reason.done() and not is_alive(pid)
        assert open_descriptors() == before

    run(scenario())


def in_turn(turn: int) -> Callable[[Replica], Coroutine[Any, Any, None]]:
    """Return a moment: so many turns of the event loop after the start began."""

    async def moment(replica: Replica) -> None:
        for _ in range(turn):
            await asyncio.sleep(0)

    return moment


async def with_a_process(replica: Replica) -> None:
    while replica.pid is None:
        await asyncio.sleep(0)


@pytest.mark.parametrize("moment", [*map(in_turn, range(1, 12)), with_a_process])
def test_a_start_that_is_cancelled_leaves_nothing(
    handmade: Handmade, moment: Callable[[Replica], Coroutine[Any, Any, None]]
) -> None:
    async def scenario() -> None:
        before = open_descriptors()
        replica = Replica(handmade(), limits=QUICK)
        starting = asyncio.create_task(replica.start())
        await moment(replica)
        assert replica.state is ReplicaState.STARTING
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.sleep(0)
        assert replica.state is ReplicaState.CLOSED and replica.pid is None
        assert open_descriptors() == before

    run(scenario())


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Leave room for so many open files while the block runs."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (int(max(open_descriptors(), key=int)) + 9, limits[1])
    )
    held = []
    with suppress(OSError):
        while True:
            held.append(os.dup(0))
    try:
        for _ in range(count):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("free", [0, 2, 4])
def test_a_process_that_the_system_refuses_is_an_error(handmade: Handmade, free: int) -> None:
    """Without files for its socket, for its lifeline, or for what it prints."""

    async def scenario() -> None:
        before, replica = open_descriptors(), Replica(handmade(), limits=QUICK)
        with free_descriptors(free), pytest.raises(ReplicaLostError, match="could be started"):
            await replica.start()
        assert replica.state is ReplicaState.CLOSED and open_descriptors() == before

    run(scenario())


def test_engines_that_do_not_load_are_an_error_at_the_start(handmade: Handmade) -> None:
    directory = handmade(onnx=NETWORKS)
    (directory / "denoiser.onnx").write_bytes(b"damaged")

    async def scenario() -> None:
        with pytest.raises(ManifestError, match="denoiser.onnx"):
            async with started(directory):
                pass

    run(scenario())


def test_a_process_that_ends_while_it_loads_is_an_error(
    handmade: Handmade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentforge.serve.worker.replica._PROGRAM", "latentforge.runtime.none")

    async def scenario() -> None:
        with pytest.raises(ReplicaLostError, match="while it loaded"):
            async with started(handmade()):
                pass

    run(scenario())


SERVER = """
import asyncio, sys
from pathlib import Path
from latentforge.serve.worker.messages import RunBatch
from latentforge.serve.worker.replica import Replica

async def main():
    replica = Replica(Path(sys.argv[1]))
    await replica.start()
    print(replica.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_worker_ends_with_its_server(handmade: Handmade) -> None:
    command = [sys.executable, "-c", SERVER, str(handmade())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment()) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert is_alive(pid)
        server.kill()
    wait_until(lambda: not is_alive(pid))


def test_a_worker_ends_with_its_server_in_the_middle_of_a_call() -> None:
    """A library's call that never returns, nor lets Python run."""
    program = (
        "import sys; from latentforge.serve.worker.program import _end_with; "
        "_end_with(int(sys.argv[1])); print('ready', flush=True); pow(7, 10**9, 10**10**5)"
    )
    read, write = os.pipe()
    command = [sys.executable, "-c", program, str(read)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=child_environment(), pass_fds=(read,)
    ) as worker:
        os.close(read)
        assert worker.stdout is not None and worker.stdout.readline()
        os.close(write)
        assert worker.wait(10) == -signal.SIGIO


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_frames_arrive_in_pieces(piece: int) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    order = RunBatch(batch=3, settings=settings("a", seed=2**64 - 1), images=(RawArray.of(pixels),))
    stream, reader = bytes(frame(order) + frame(Ping()) * 2), FrameReader(Order)
    pieces = [stream[start : start + piece] for start in range(0, len(stream), piece)]
    found = [message for each in pieces for message in reader.feed(each)]
    assert found == [order, Ping(), Ping()]
    assert np.array_equal(found[0].images[0].array, pixels)
    parts = found[0].images[0].parts
    assert np.array_equal(parts, pixels) and all(part.base is None for part in parts)


@pytest.mark.parametrize("stream", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\2\x81\0"])
def test_other_bytes_are_refused(stream: bytes) -> None:
    with pytest.raises(BackendError, match="a worker process sent"):
        list(FrameReader(Order).feed(stream))


def test_previews_divide_a_run_evenly() -> None:
    def due(count: int, previews: int) -> list[int]:
        return [index for index in range(count) if is_preview_due(index, count, previews)]

    assert due(10, 0) == [] and due(10, 1) == [4] and due(10, 3) == [2, 4, 7]
    assert due(4, 3) == due(4, 100) == [0, 1, 2] and due(1, 5) == []


def test_pauses_grow_to_a_limit() -> None:
    limits = WorkerLimits()
    assert [limits.pause(losses) for losses in (1, 2, 3, 7, 1000)] == [0.5, 1, 2, 30, 30]
    for wrong in ({"step": 0.0}, {"load": float("nan")}, {"ping": -1.0}):
        with pytest.raises(SettingsError, match=rf"{next(iter(wrong))} must be a number from"):
            WorkerLimits(**wrong)
