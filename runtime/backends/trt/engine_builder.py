"""Building of TensorRT engines: network, optimization profiles, settings, and progress."""

import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.runtime.backends import NO_MEMORY, Options, Report
from latentforge.runtime.backends.signature import Signature, check_signature
from latentforge.runtime.backends.trt import trt_common
from latentforge.runtime.backends.trt.trt_common import CHOICES, RTX, Log, Profile, implement
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.manifest import Component

__all__ = ["PARTS", "EngineBuilder", "Phases", "supported_capabilities"]

PARTS = 1000
"""Units of the progress that a build reports."""

_FLAGS = {
    "sparse": "SPARSE_WEIGHTS",
    "weight_streaming": "WEIGHT_STREAMING",
    "strip": "STRIP_PLAN",
    "refit": "REFIT",
    "version_compatible": "VERSION_COMPATIBLE",
}
_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|alloc\w* failed|map file to memory", re.IGNORECASE)


class EngineBuilder:
    """Parsed network with the settings of its build."""

    def __init__(self, library: Any, onnx: Path, component: Component, options: Options) -> None:
        self._library = library
        self._onnx = onnx
        self._component = component
        self._log = Log(library)
        self._profiles = trt_common.profiles(component)
        self._builder = library.Builder(self._log.sink)
        flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        self._parse()
        self._check_tensors()
        self._config = self._builder.create_builder_config()
        self._configure(options)

    def _parse(self) -> None:
        trt_common.check_links(self._onnx.parent)
        parser = self._parser = self._library.OnnxParser(self._network, self._log.sink)
        if not parser.parse_from_file(str(self._onnx)):
            error = parser.get_error(0) if parser.num_errors else None
            node = f"{error.node_operator()} {error.node_name()}".strip() if error else ""
            raise self._refused(f"{node}: " if node else "")

    def _check_tensors(self) -> None:
        network, part = self._network, self._component
        self._inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        check_signature(f"{self._onnx}: input", part.inputs, _signature(self._inputs))
        check_signature(f"{self._onnx}: output", part.outputs, _signature(outputs))

    def _configure(self, options: Options) -> None:
        library, config = self._library, self._config
        for name, flag in _FLAGS.items():
            if options.get(name):
                config.set_flag(getattr(library.BuilderFlag, flag))
        if "level" in options:
            config.builder_optimization_level = options["level"]
        if "workspace" in options:
            pool = library.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(pool, options["workspace"] << 20)
        if compatible := options.get("hardware_compatible"):
            level = CHOICES["hardware_compatible"][compatible]
            config.hardware_compatibility_level = getattr(library.HardwareCompatibilityLevel, level)
        for shapes in self._profiles:
            for tensor in self._inputs:
                _check_range(f"{self._onnx}: {tensor.name}", tensor.shape, shapes[tensor.name])
            if any(-1 in tensor.shape for tensor in self._inputs):
                self._add_profile(shapes)

    def _add_profile(self, shapes: Profile) -> None:
        profile = self._builder.create_optimization_profile()
        for tensor in self._inputs:
            if -1 in tensor.shape:
                profile.set_shape(tensor.name, *shapes[tensor.name])
        if self._config.add_optimization_profile(profile) < 0:
            raise self._refused("sizes: ")

    def set_capabilities(self, capabilities: tuple[str, ...]) -> None:
        """Build for GPUs of these compute capabilities; BackendError if one is refused."""
        values = supported_capabilities(self._library)
        self._config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            if not self._config.set_compute_capability(values[capability], index):
                raise self._refused(f"compute capability {capability}: ")

    def run(self, timing: Path, report: Report) -> Any:
        """Build, and return the engine as a buffer that the library owns.

        The library runs in another thread, so that Ctrl-C is handled here at once. An exception
        from report ends the build, too.

        Args:
            timing: cache file with kernel timings of earlier builds on this GPU.
            report: called with the progress, in PARTS.
        """
        ended: list[BaseException] = []
        self._config.progress_monitor = _monitor(self._library, report, ended)
        if self._component.backend != RTX:
            _read_timing(self._config, timing)
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(self._builder.build_serialized_network, self._network, self._config)
            try:
                plan = work.result()
            except BaseException as error:
                ended.append(error)
                raise
        if ended:
            raise ended[0]
        if plan is None:
            raise self._refused()
        if self._component.backend != RTX:
            trt_common.write_cache(timing, self._config.get_timing_cache().serialize())
        report("built", PARTS, PARTS)
        return plan

    def _refused(self, what: str = "") -> BackendError:
        reason = self._log.take_errors() or "without giving a reason"
        if _MEMORY.search(reason):
            reason = f"{reason}: {NO_MEMORY}"
        return BackendError(f"{self._library.__name__} refuses {self._onnx}: {what}{reason}")


def supported_capabilities(library: Any) -> dict[str, Any]:
    """Return the library's values by compute capability: ``SM120`` is ``12.0``."""
    members = library.ComputeCapability.__members__.items()
    return {f"{key[2:-1]}.{key[-1]}": value for key, value in members if key.startswith("SM")}


def _signature(tensors: list[Any]) -> Signature:
    return {t.name: (trt_common.dtype_of(t.dtype), tuple(t.shape)) for t in tensors}


def _check_range(what: str, shape: Iterable[int], bounds: tuple[tuple[int, ...], ...]) -> None:
    """Raise SettingsError if a dimension of the graph is fixed to another size than requested."""
    for size, low, _, high in zip(shape, *bounds, strict=True):
        if size != -1 and not low == size == high:
            raise SettingsError(
                f"{what}: sizes {low} to {high} are requested, and the graph is fixed to {size}: "
                f"export it again with that dimension free, or build for {size}"
            )


def _read_timing(config: Any, path: Path) -> None:
    """Reuse kernel timings of an earlier build on this GPU, or start from an empty cache."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


class Phases:
    """Progress of a build with nested phases, as one number that never decreases.

    The number of inner phases of a step is unknown in advance, so each of them accounts for half
    of the step's remaining progress.

    Attributes:
        reached: progress from 0 to 1.
    """

    def __init__(self) -> None:
        self.reached = 0.0
        self._open: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Record that a phase begins, within a step of its parent."""
        outer = self._open.get(parent or "")
        start = outer.reached if outer else 0.0
        width = (outer.step_end - start) / 2 if outer else 1.0
        self._open[name] = _Phase(outer, start, width / max(1, steps), start + width)
        self._open[name].reach(start)
        self.reached = max(self.reached, start)

    def step(self, name: str, index: int) -> None:
        """Record that a phase has finished the step of this index, from 0."""
        if phase := self._open.get(name):
            phase.reach(phase.start + phase.step_width * (index + 1))
            self.reached = max(self.reached, phase.reached)

    def finish(self, name: str) -> None:
        """Record that a phase has ended, with or without all of its steps."""
        phase = self._open.pop(name, None)
        if phase and phase.parent:
            phase.parent.reached = max(phase.parent.reached, phase.end)


@dataclass
class _Phase:
    """Open phase, from start to end of the build's progress, and the step that it is in."""

    parent: "_Phase | None"
    start: float
    step_width: float
    end: float
    reached: float = 0.0
    step_end: float = 0.0

    def reach(self, position: float) -> None:
        """Begin the step at a position."""
        self.reached = min(position, self.end)
        self.step_end = min(position + self.step_width, self.end)


def _monitor(library: Any, report: Report, ended: list[BaseException]) -> Any:
    """Return a progress monitor, which ends the build at the next step if ``ended`` has an item."""
    phases, lock = Phases(), threading.Lock()  # the library may report from several threads

    def publish(name: str) -> None:
        try:
            report(name, min(int(phases.reached * PARTS), PARTS - 1), PARTS)
        except BaseException as error:  # the library would only print it
            ended.append(error)

    def start(name: str, parent: str | None, steps: int) -> None:
        with lock:
            phases.start(name, parent, steps)
            publish(name)

    def step(name: str, index: int) -> bool:
        with lock:
            phases.step(name, index)
            publish(name)
        return not ended

    def finish(name: str) -> None:
        with lock:
            phases.finish(name)

    return implement(
        library.IProgressMonitor, phase_start=start, step_complete=step, phase_finish=finish
    )
