"""Quality gate: overrides are checked, and failures are found."""

import pytest

from latentforge.optimize.gate.gate import Gate
from latentforge.runtime.errors import SettingsError


def test_overrides_replace_thresholds() -> None:
    gate = Gate(psnr=20.0).with_overrides(["psnr=35", "ssim=0.9", "images=2"])
    assert gate.thresholds == {"psnr": 35.0, "ssim": 0.9} and gate.images == 2


@pytest.mark.parametrize(
    "override", ["pnsr=3", "psnr", "psnr=good", "images=0", "images=1.5", "=1"]
)
def test_wrong_overrides_are_refused(override: str) -> None:
    with pytest.raises(SettingsError, match="gate"):
        Gate().with_overrides([override])


def test_failures_name_each_figure_that_misses_its_threshold() -> None:
    gate = Gate(psnr=30, ssim=0.9, max_relative_error=0.1)
    measured = {
        "denoiser": {"max_relative_error": 0.2},
        "vae_decoder": {"max_relative_error": 0.05},
        "image": {"psnr": 29.0, "ssim": float("nan")},
    }
    failures = list(gate.failures(measured))
    assert len(failures) == 3
    assert [failure.split(":")[0] for failure in failures] == ["image", "image", "denoiser"]
    assert list(Gate().failures(measured)) == []
