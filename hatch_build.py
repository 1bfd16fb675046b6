"""Compile the runtime's kernels on the way into a wheel, or do without."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["NativeBuildHook"]


class NativeBuildHook(BuildHookInterface[Any]):
    """Puts the library into the wheel where it can be built, which then is of this platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        native = runpy.run_path(str(Path(self.root) / "runtime" / "kernels" / "compiler.py"))
        if failure := native["build"]():
            self.app.display_warning(
                f"latentforge is installed without its own kernels and runs on ONNX Runtime's: "
                f"{failure}"
            )
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(f"/runtime/kernels/{native['LIBRARY'].name}")
