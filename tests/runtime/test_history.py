"""History records: every stage records its tools and its duration in the same way."""

import importlib.metadata
import time

import numpy as np
import pytest

from latentforge.commands.describe import STAGE_LINES
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import Stage
from latentforge.runtime.manifest.history import OTHER_STAGES, check_stage
from latentforge.runtime.version import __version__


def test_a_record_has_the_version_and_the_duration() -> None:
    start = time.perf_counter() - 1.26
    record = Stage.ended("tune", start, {"rows": 2}, tools={"numpy": "2"}, passes={"fuse": 3})
    elapsed = time.perf_counter() - start
    assert (record.name, record.options, record.passes) == ("tune", {"rows": 2}, {"fuse": 3})
    assert list(record.tools.items()) == [("latentforge", __version__), ("numpy", "2")]
    assert 1.3 <= record.seconds <= round(elapsed, 1)
    assert record.measured == {}


def test_onnxruntime_may_come_as_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu has the same module; where both are installed, one of them is imported."""
    import onnxruntime

    for installed in ("0.0.1", None):

        def version(name: str, found: str | None = installed) -> str:
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        record = Stage.ended("tune", time.perf_counter(), {}, ["onnxruntime"])
        assert record.tools["onnxruntime"] == onnxruntime.__version__


def test_a_record_has_the_versions_of_packages() -> None:
    record = Stage.ended("tune", time.perf_counter(), {}, ["numpy"])
    assert list(record.tools.items()) == [("latentforge", __version__), ("numpy", np.__version__)]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        Stage.ended("tune", time.perf_counter(), {}, ["numpy", "no-such-package"])


@pytest.mark.parametrize("name", ["optimize", "heun", "tune", ""])
@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({}, {"image": {"psnr": 40.0, "images": 1}}),
        ({"recipe": "fp16"}, {}),
        ({"target": "cpu"}, {}),
    ],
)
def test_a_stage_of_any_name_has_what_its_description_reads(
    name: str, options: dict[str, object], measured: dict[str, dict[str, float]]
) -> None:
    stage = Stage(name=name, options=options, tools={}, seconds=1.0, measured=measured)
    with pytest.raises(ManifestError, match="history"):
        check_stage(stage)


def test_stages_that_edit_no_graphs_are_described_by_their_own_lines() -> None:
    assert OTHER_STAGES == STAGE_LINES.keys()
