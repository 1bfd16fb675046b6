"""Build hook of the package: compiles the kernels in runtime/kernels into the wheel.

Without a C++ compiler the wheel has their sources instead, which can be compiled later, and the
package uses ONNX Runtime's operators.
"""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["NativeBuildHook"]


class NativeBuildHook(BuildHookInterface[Any]):
    """Hook that adds the compiled library to the wheel, which is then specific to this platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root) / "runtime" / "kernels"
        compiler = runpy.run_path(str(folder / "compiler.py"))
        if failure := compiler["build"]():
            self.app.display_warning(
                f"latentforge is installed without its own kernels and runs on ONNX Runtime's: "
                f"{failure}"
            )
            sources = [*folder.glob("*.cpp"), *folder.glob("*.h")]
            inside = {str(path): f"latentforge/runtime/kernels/{path.name}" for path in sources}
            build_data["force_include"].update(inside)
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(f"/runtime/kernels/{compiler['LIBRARY'].name}")
