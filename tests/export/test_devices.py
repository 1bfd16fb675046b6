"""Exports with torch on a GPU: refused by name without one, and emulated on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from latentforge.build import BuildRequest, build
from latentforge.command_line import run
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
@pytest.mark.parametrize("command", ["export", "build"])
def test_commands_refuse_it_in_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a build's plan, which would be that of another command on this machine."""
    plan = ["--dry-run"] if command == "build" else []
    status = run([command, "demo", str(tmp_path / "engines"), "--device", "cuda", *plan])
    out, errors = capsys.readouterr()
    assert (status, out) == (2, "") and len(errors.splitlines()) == 1, errors
    assert "finds no CUDA GPU here; leave --device out" in errors


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "", "CPU"])
def test_there_are_two_devices(tmp_path: Path, device: str) -> None:
    with pytest.raises(SettingsError, match=f"no device '{device}'"):
        export("none", tmp_path / "engines", ExportRequest(device=device))
    with pytest.raises(SettingsError, match=f"no device '{device}'"):
        build("none", tmp_path / "engines", BuildRequest(device=device))
    require_device("cpu")


def test_a_build_hands_its_device_to_the_export(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded and refused there, before anything runs."""
    asked: list[str] = []

    def refuse(source: str, target: Path, request: ExportRequest) -> None:
        asked.append(request.device)
        raise DeviceError("no GPU")

    monkeypatch.setattr("latentforge.build.require_device", lambda _: None)
    monkeypatch.setattr("latentforge.build.export", refuse)
    with pytest.raises(DeviceError, match="no GPU"):
        build(str(tiny_checkpoint), tmp_path / "engines", BuildRequest(device="cuda"))
    assert asked == ["cuda"] and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("name", ["sd", "sdxl", "pix2pix", "sd-depth", "upscaler", "bk-sdm"])
def test_no_module_mixes_devices(tiny: Callable[[str], Path], name: str) -> None:
    """On the meta device an operation with a tensor of the CPU fails, as it would on a GPU."""
    checkpoint = open_checkpoint(str(tiny(name)))
    for plan in family_of(checkpoint).plan(checkpoint).components:
        free = {size for spec in plan.inputs.values() for size in spec.shape}
        sizes = {size: 2 if size == "batch" else 16 for size in free if isinstance(size, str)}
        feeds = {
            key: torch.zeros(spec.resolve(sizes), dtype=getattr(torch, spec.dtype), device="meta")
            for key, spec in plan.inputs.items()
        }
        with torch.inference_mode():
            made = plan.load(checkpoint).to("meta")(**feeds)
        made = made if isinstance(made, tuple) else (made,)
        assert {value.device.type for value in made} == {"meta"}, plan.name


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
