"""Libraries' telemetry, which is off in every process that imports latentforge.

ONNX Runtime would open a database in the cache folder, write ``$TMPDIR/.ses`` through links, and
look up a host, all when it is imported; OpenVINO would write to ``~/intel`` and send an event;
Hugging Face's libraries would describe the machine to the hub with each request.

Imports only modules that Python has loaded before any file of a user could take their place.
"""

import os
import sys

__all__ = ["SWITCHES", "disable"]

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Environment variables that the libraries read when they are imported."""

_PACKAGE = "openvino_telemetry"  # no variable turns it off; openvino works without the package


def disable() -> None:
    """Turn the telemetry of libraries off, where the user has not set a variable otherwise.

    It has no effect on a library that was imported before.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault(_PACKAGE, None)  # type: ignore[arg-type]  # makes its import fail
