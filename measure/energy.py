"""Energy counters of this machine: processor packages by RAPL, NVIDIA GPUs by NVML."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.measure.hardware import gpus, nvml

__all__ = ["EnergyMeter", "energy_meters", "total_joules"]

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyMeter:
    """Counter of joules from an arbitrary origin.

    Attributes:
        wrap: joules after which the counter restarts from 0.
    """

    name: str
    read: Callable[[], float]
    wrap: float = math.inf

    def since(self, before: float) -> float:
        """Return the joules spent since the counter read ``before``."""
        spent = self.read() - before
        return spent if spent >= 0 else spent + self.wrap


def energy_meters() -> list[EnergyMeter]:
    """Return the energy counters that this process may read; often there are none."""
    return [*_rapl_meters(), *_nvml_meters()]


def total_joules(spent: Sequence[float]) -> float | None:
    """Return the sum over all meters, or None without meters."""
    return math.fsum(spent) if spent else None


def _rapl_meters(root: Path = _POWERCAP) -> list[EnergyMeter]:
    """Return the meters of processor packages, which include their cores and memory controllers."""
    meters = []
    for folder in sorted(root.glob("intel-rapl:*")):
        counter = folder / "energy_uj"
        with suppress(OSError, ValueError):  # readable by root alone since CVE-2020-8694
            if not (folder / "name").read_text().startswith("package"):
                continue
            wrap = int((folder / "max_energy_range_uj").read_text()) / 1e6
            read = functools.partial(_rapl_joules, counter)
            read()
            meters.append(EnergyMeter(folder.name, read, wrap))
    return meters


def _rapl_joules(counter: Path) -> float:
    return int(counter.read_text()) / 1e6


def _nvml_meters() -> list[EnergyMeter]:
    library, meters = nvml(), []
    for handle, name in gpus():
        read = functools.partial(_nvml_joules, library, handle)
        with suppress(Exception):  # GPUs older than Volta do not count energy
            read()
            meters.append(EnergyMeter(name, read))
    return meters


def _nvml_joules(library: Any, handle: Any) -> float:
    return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
