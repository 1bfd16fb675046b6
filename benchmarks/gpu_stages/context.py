"""Place, sizes and record of a stage."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "StageRecord"]

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class StageRecord:
    """One stage: what it has shown so far is in its file after every step.

    Attributes:
        name: of the stage, and of its file.
        output: folder of the JSON files.
        work: folder of checkpoints and engines, shared by the stages.
        dry: rehearse on the CPU with tiny sizes.
    """

    name: str
    output: Path
    work: Path
    dry: bool
    facts: dict[str, Any] = field(default_factory=dict)

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

    def record(self, key: str, value: Any) -> None:
        """Add a fact, and write the file anew."""
        self.facts[key] = value
        print(f"{self.name}: {key}: {value}", flush=True)
        path = self.output / f"{self.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.facts, indent=1, default=str))
        os.replace(part, path)

    def command(self, key: str, *words: object) -> bool:
        """Run a command and record its time, and its error whole; return True if it succeeded."""
        start = time.time()
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT)
        fact: dict[str, Any] = {"code": done.returncode, "seconds": round(time.time() - start, 1)}
        if done.returncode:
            fact["error"] = done.stderr[-20_000:]
        fact["output"] = done.stdout[-4_000:]
        self.record(key, fact)
        return done.returncode == 0

    def forge(self, key: str, *words: object) -> bool:
        """Run a command of latentforge."""
        return self.command(key, sys.executable, "-m", "latentforge", *words)

    def engines(self, name: str, checkpoint: object, recipe: str) -> Path | None:
        """Export, optimize and compile a checkpoint; None if a step failed. Exports are shared."""
        exported = self.work / f"{name}-exported"
        if not exported.exists() and not self.forge(
            f"{name} export", "export", checkpoint, exported
        ):
            return None
        made, engines = self.work / f"{name}-{recipe}", self.work / f"{name}-{recipe}-engines"
        gate = ["--gate", "images=1", "--steps", "2", "--sampler", "ddim", "--repeats", "0"]
        how = ["--target", self.target, "--recipe", recipe, *gate, "--overwrite"]
        if not self.forge(f"{name} optimize {recipe}", "optimize", exported, made, *how):
            return None
        to = ["--backend", self.backend, "--overwrite"]
        done = self.forge(f"{name} compile {recipe}", "compile", made, engines, *to)
        return engines if done else None
