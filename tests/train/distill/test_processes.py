"""Two processes with Accelerate train as one with twice the batch does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import training_process


def losses(folder: Path) -> list[float]:
    """Return the losses of all updates."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def free_port() -> str:
    """Return a port that nothing listens to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.thorough
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    program = Path(training_process.__file__)
    common = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(two), "2"],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    training_process.train(one, 4)
    assert [process.wait(120) for process in processes] == [0, 0]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert len(losses(one)) == 3 and losses(one)[0] > 0
