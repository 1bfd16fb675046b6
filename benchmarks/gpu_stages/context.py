"""Place, sizes and record of a stage."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "StageRecord"]

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage: what it has shown so far is in its file after every step.

    Attributes:
        name: of the stage, and of its file.
        output: folder of the file.
        work: folder of checkpoints and engines, shared by the stages.
        dry: rehearse on the CPU with tiny sizes.
        deadline: end of its time box, of time.monotonic().
        facts: texts and figures by name.
        failures: errors by name, whole.
        metrics: figures of quality: name, subject, images, value, unit.
        results: benchmarks, as in latentforge's result files.
    """

    name: str
    output: Path
    work: Path
    dry: bool
    deadline: float = float("inf")
    facts: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    @property
    def backend(self) -> str:
        """The CUDA provider, or in a rehearsal the CPU's."""
        return "onnxruntime" if self.dry else "onnxruntime-cuda"

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the same provider."""
        return "CPUExecutionProvider" if self.dry else "CUDAExecutionProvider"

    @property
    def target(self) -> str:
        """Target of optimize."""
        return "cpu" if self.dry else "cuda"

    @property
    def placement(self) -> str:
        """Device and precision of the reference in torch."""
        return "cpu:fp32" if self.dry else "cuda:fp16"

    @property
    def seconds_left(self) -> float:
        """Seconds until the end of the time box."""
        return self.deadline - time.monotonic()

    def record(self, name: str, value: Any) -> None:
        """Add a fact."""
        self.facts[name] = value
        self._write(f"{name}: {value}")

    def fail(self, name: str, error: str) -> None:
        """Add a failure."""
        self.failures[name] = error
        self._write(f"{name}: failed: {error}")

    def measure(self, name: str, subject: str, images: int, value: float, unit: str) -> None:
        """Add a figure of quality."""
        one = {"name": name, "subject": subject, "images": images, "value": value, "unit": unit}
        self.metrics.append(one)
        self._write(str(one))

    def add(self, results: Any) -> None:
        """Add a benchmark, of latentforge's Results."""
        self.results.append(json.loads(results.encode()))
        self._write(f"benchmark: {results.title}")

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what a step returns, or None after recording its failure; the stage goes on."""
        try:
            return work()
        except Exception:
            self.fail(name, traceback.format_exc())
            return None

    def command(self, name: str, *words: object, codes: tuple[int, ...] = (0,)) -> bool:
        """Run a command and record its time and last lines; return True if its code is allowed."""
        start = time.monotonic()
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT)
        seconds = time.monotonic() - start
        allowed = done.returncode in codes
        reason = done.stderr[-2000:] if allowed and done.returncode else ""
        self.record(name, f"{seconds:.1f} s\n{done.stdout[-2000:]}{reason}".strip())
        if not allowed:
            self.fail(name, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return allowed

    def forge(self, name: str, *words: object) -> bool:
        """Run a command of latentforge."""
        return self.command(name, sys.executable, "-m", "latentforge", *words)

    def engines(self, name: str, checkpoint: object, recipe: str) -> Path | None:
        """Export, optimize and compile a checkpoint; None if a step failed. Exports are shared."""
        exported = self.work / f"{name}-exported"
        if not exported.exists() and not self._export(name, checkpoint, exported):
            return None
        made, engines = self.work / f"{name}-{recipe}", self.work / f"{name}-{recipe}-engines"
        gate = ["--gate", "images=1", "--steps", "2", "--sampler", "ddim", "--repeats", "0"]
        how = ["--target", self.target, "--recipe", recipe, *gate, "--overwrite"]
        if not self.forge(f"{name}: optimize {recipe}", "optimize", exported, made, *how):
            return None
        to = ["--backend", self.backend, "--overwrite"]
        done = self.forge(f"{name}: compile {recipe}", "compile", made, engines, *to)
        return engines if done else None

    def _export(self, name: str, checkpoint: object, target: Path) -> bool:
        """Export with torch on the GPU, or if that fails on the CPU."""
        words = ["export", checkpoint, target]
        if not self.dry and self.forge(f"{name}: export on the GPU", *words, "--device", "cuda"):
            return True
        return self.forge(f"{name}: export", *words)

    def _write(self, line: str) -> None:
        print(f"{self.name}: {line}", flush=True)
        path = self.output / f"{self.name}.json"
        content = {
            "facts": self.facts,
            "failures": self.failures,
            "metrics": self.metrics,
            "results": self.results,
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1, default=str))
        os.replace(part, path)
