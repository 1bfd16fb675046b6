"""Device and arithmetic of a participant in torch: ``cpu:fp32``, ``cuda:fp16``."""

from collections.abc import Sequence
from dataclasses import dataclass

from latentforge.runtime.backends import BACKENDS
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.text import near_miss

__all__ = ["DEVICES", "PRECISIONS", "Placement", "device_of"]

DEVICES: Sequence[str] = ("cpu", "cuda")
PRECISIONS: Sequence[str] = ("fp32", "fp16", "bf16")
_DENOISER = "denoiser"


@dataclass(frozen=True)
class Placement:
    """Device and precision in which a participant computes.

    Attributes:
        device: one of DEVICES.
        precision: one of PRECISIONS, of weights and activations.
    """

    device: str = "cpu"
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.device}:{self.precision}"

    @classmethod
    def of(cls, manifest: Manifest) -> "Placement":
        """Return that of engines: their backend's device, and the precision of their denoiser.

        Precisions that torch's modules do not compute in, such as int8, are half precision on a
        GPU and single precision on a CPU.
        """
        device = device_of(manifest)
        parts = manifest.components
        named = parts[_DENOISER].precision if _DENOISER in parts else ""
        other = "fp16" if device == "cuda" else "fp32"
        return cls(device, named if named in PRECISIONS else other)

    def parsed(self, text: str) -> "Placement":
        """Return the placement that ``DEVICE``, ``DEVICE:PRECISION`` or ``:PRECISION`` asks for.

        What the text leaves out is this placement's own.

        Raises:
            SettingsError: there is no such device or precision.
        """
        device, colon, precision = text.partition(":")
        if not device and not precision or (colon and not precision):
            raise SettingsError(f"expected DEVICE:PRECISION such as cuda:fp16, not {text!r}")
        for kind, value, allowed in (
            ("device", device, DEVICES),
            ("precision", precision, PRECISIONS),
        ):
            if value and value not in allowed:
                raise SettingsError(f"no {kind} {value!r} in {text!r}: {near_miss(value, allowed)}")
        return Placement(device or self.device, precision or self.precision)


def device_of(manifest: Manifest) -> str:
    """Return ``cuda`` if a backend of the engines needs an NVIDIA GPU, and ``cpu`` otherwise."""
    backends = {component.backend for component in manifest.components.values()}
    return "cuda" if any(BACKENDS[b].gpu for b in backends if b in BACKENDS) else "cpu"
