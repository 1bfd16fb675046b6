"""Exports with torch on a GPU: refused by name without one, and emulated on the CPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.parity import LazyModules, TorchSession
from latentforge.export.reference.devices import require_device, without_tf32
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.errors import DeviceError, SettingsError

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@NO_GPU
def test_a_missing_gpu_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="device cuda: torch .* finds no CUDA GPU here"):
        export("none", tmp_path / "engines", ExportRequest(device="cuda"))
    assert not (tmp_path / "engines").exists()


@NO_GPU
def test_the_command_refuses_it_in_one_line(tmp_path: Path) -> None:
    words = ["export", "demo", tmp_path / "engines", "--device", "cuda"]
    command = [sys.executable, "-m", "latentforge", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "finds no CUDA GPU here; leave --device out" in lines[0]


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "", "CPU"])
def test_there_are_two_devices(tmp_path: Path, device: str) -> None:
    with pytest.raises(SettingsError, match=f"no device '{device}'"):
        export("none", tmp_path / "engines", ExportRequest(device=device))
    require_device("cpu")


def test_modules_run_on_their_device_and_return_arrays_of_the_host(tiny_checkpoint: Path) -> None:
    """The CPU under another name takes the way of a GPU."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plans = {plan.name: plan for plan in family_of(checkpoint).plan(checkpoint).components}
    plan, feeds = plans["text_encoder"], {"input_ids": np.zeros((1, 24), np.int32)}
    outputs = []
    for device in ("cpu", "cpu:0"):
        session = TorchSession(plan, LazyModules(checkpoint, device))
        outputs.append(session.run(feeds))
        session.close()
    assert outputs[0].keys() == outputs[1].keys() == plan.outputs.keys()
    for name, value in outputs[0].items():
        np.testing.assert_array_equal(value, outputs[1][name])


def test_tf32_is_off_meanwhile_on_a_gpu_alone() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = True
        with without_tf32("cpu"):
            assert cudnn.allow_tf32
        with pytest.raises(KeyError), without_tf32("cuda"):
            assert not cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert cudnn.allow_tf32
    finally:
        cudnn.allow_tf32 = before
