"""Place, sizes and record of a stage."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["REFUSED", "ROOT", "StageRecord", "load_cuda"]

REFUSED = 2  # latentforge's exit status, with one line that says why
ROOT = Path(__file__).parent.parent.parent

_SHOWN = 2000  # last characters of a command's output that are a fact
_HOUR = 3600.0
_TO_WRITE = 2.0  # seconds to record a command that was ended
_GATE = (
    *("--gate", "images=1", "--steps", "2", "--sampler", "ddim"),
    *("--repeats", "0", "--budget", "none"),
)
"""Of optimize: the images are compared with diffusers' afterwards, and the times with its own."""


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
    deadline: float = field(default_factory=lambda: time.monotonic() + _HOUR)
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
        """Run a command and record its time and last lines; return True if its code is allowed.

        One that would outlast the stage is ended just before, so that its output is kept.
        """
        start = time.monotonic()
        code, out, errors = _run([*map(str, words)], max(self.seconds_left - _TO_WRITE, 1.0))
        seconds = time.monotonic() - start
        allowed = code in codes
        reason = errors[-_SHOWN:] if allowed and code else ""
        self.record(name, f"{seconds:.1f} s\n{out[-_SHOWN:]}{reason}".strip())
        if not allowed:
            status = "out of time" if code is None else f"exit status {code}"
            self.fail(name, f"{status}\n{out}\n{errors}")
        return allowed

    def forge(self, name: str, *words: object) -> bool:
        """Run a command of latentforge."""
        return self.command(name, sys.executable, "-m", "latentforge", *words)

    def engines(self, name: str, checkpoint: object, recipe: str) -> Path | None:
        """Export, optimize and compile a checkpoint; None if a step failed.

        What an earlier step or stage has made is used again.
        """
        engines = self.work / f"{name}-{recipe}-engines"
        if engines.exists():
            return engines
        if (made := self.optimized(name, checkpoint, recipe)) is None:
            return None
        to = ["--backend", self.backend, "--overwrite"]
        done = self.forge(f"{name}: compile {recipe}", "compile", made, engines, *to)
        return engines if done else None

    def optimized(
        self, name: str, checkpoint: object, recipe: str, *options: object, target: str = ""
    ) -> Path | None:
        """Export and optimize a checkpoint, with these options; likewise.

        The providers for the CPU and for CUDA load the result as it is.
        """
        made = self.work / "-".join(filter(None, [name, recipe, target]))
        if made.exists():
            return made
        if (exported := self.exported(name, checkpoint)) is None:
            return None
        how = ["--target", target or self.target, "--recipe", recipe, *_GATE, *options]
        step = f"{name}: optimize {recipe} {target}".strip()
        done = self.forge(step, "optimize", exported, made, *how, "--overwrite")
        return made if done else None

    def exported(self, name: str, checkpoint: object) -> Path | None:
        """Export with torch on the GPU, or if that fails on the CPU; None if both fail."""
        target = self.work / f"{name}-exported"
        words = ["export", checkpoint, target]
        on_gpu = [*words, "--device", "cuda"]
        if target.exists() or not self.dry and self.forge(f"{name}: export on the GPU", *on_gpu):
            return target
        return target if self.forge(f"{name}: export", *words) else None

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


def _run(words: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """Return a command's exit status, None if it was ended, and what it wrote."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
        return done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as ended:
        return None, *(_text(written) for written in (ended.stdout, ended.stderr))


def _text(written: str | bytes | None) -> str:
    return written.decode(errors="replace") if isinstance(written, bytes) else written or ""


def load_cuda() -> None:
    """Load the libraries that the CUDA provider needs from their packages, as our sessions do."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # prints what it does not find
        onnxruntime.preload_dlls(directory="")
