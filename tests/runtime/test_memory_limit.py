"""Allocations far beyond what an engine needs fail while it is loaded, and only then."""

import os
import resource
import threading
from collections.abc import Callable

import numpy as np
import pytest

from latentforge import interrupts
from latentforge.runtime.memory_limit import limited_memory, load_memory, run_memory

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="not Linux")


def in_child(work: Callable[[], bool]) -> bool:
    """Return what some work returns in a process of its own, of one thread."""
    child = os.fork()
    if child == 0:
        result = False
        try:
            result = work()
        finally:
            os._exit(0 if result else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def allocates(gigabytes: int) -> bool:
    try:
        np.empty(gigabytes << 30, np.uint8)  # whose pages are not touched
    except MemoryError:
        return False
    return True


def within(weights: int, copies: int, gigabytes: int) -> bool:
    with limited_memory(load_memory(weights, copies)):
        return allocates(gigabytes)


def test_the_limit_grows_with_the_weights() -> None:
    assert in_child(lambda: not within(0, 1, 4))
    assert in_child(lambda: within(1 << 28, 1, 4))
    assert in_child(lambda: not within(1 << 28, 1, 12))
    assert in_child(lambda: within(1 << 28, 3, 12))


def test_a_run_may_take_what_its_sizes_need() -> None:
    assert run_memory(10_000) < 1 << 30
    assert run_memory(4 * 4 * 64 * 64) > 7 << 30  # a denoiser at 512 x 512
    assert run_memory(4 * 4 * 128 * 128) > 70 << 30  # and at 1024 x 1024, with all scores
    assert run_memory(3 * 512 * 512) > 8 << 30  # a decoder


def test_threads_of_latentforge_do_not_count() -> None:
    def work() -> bool:
        wait = threading.Event()
        threading.Thread(target=wait.wait, name="interrupts", daemon=True).start()
        return not within(0, 1, 4)

    assert in_child(work)


def test_the_limit_ends_with_the_block() -> None:
    def work() -> bool:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        try:
            with limited_memory(0):
                inside = resource.getrlimit(resource.RLIMIT_DATA)
                raise KeyError
        except KeyError:
            after = resource.getrlimit(resource.RLIMIT_DATA)
            return before == after != inside and inside[1] == before[1] and allocates(4)

    assert in_child(work)


def test_a_lower_limit_of_the_user_stays() -> None:
    def work() -> bool:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, hard))
        with limited_memory(1 << 36):
            inside = resource.getrlimit(resource.RLIMIT_DATA)
        return inside[0] == 3 << 30 == resource.getrlimit(resource.RLIMIT_DATA)[0]

    assert in_child(work)


def test_other_threads_are_not_limited() -> None:
    def work() -> bool:
        wait = threading.Event()
        thread = threading.Thread(target=wait.wait, daemon=True)
        thread.start()
        try:
            return within(0, 1, 4)
        finally:
            wait.set()

    assert in_child(work)


def test_threads_of_a_command_that_only_wait_lift_no_limit() -> None:
    """As that which waits for Ctrl-C, in every command."""

    def work() -> bool:
        interrupts.handle(forced=True)
        before = resource.getrlimit(resource.RLIMIT_DATA)
        with limited_memory(0):
            return before != resource.getrlimit(resource.RLIMIT_DATA)

    assert in_child(work)
