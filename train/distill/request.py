"""Request for the training of a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.settings import Request, check_incomplete
from latentforge.runtime.validation import check_count, check_number, check_optional_count

__all__ = ["CONSISTENCY_STEPS", "DistillRequest", "Precision"]

Precision = Literal["fp32", "bf16", "fp16"]

CONSISTENCY_STEPS = 50
"""Steps of the teacher that a student of fewer steps learns from, and takes at most."""

_MAX_UPDATES = 10**9
_MAX_MINUTES = 60.0 * 24 * 365
_MAX_ROWS = 1 << 16
_MAX_RUNS = 1 << 20
_MAX_SIZE = 16_384  # pixels
_MAX_RANK = 4096
_MAX_SCALE = 1e4  # of guidance

_SHARES = ("guided", "block_drop", "first_phase", "cooldown")
_WITHOUT_EFFECT = (
    "overwrite",
    "updates",
    "minutes",
    "work",
    "log",
    "quiet",
    "license",
    "save_every",
)
"""Fields that a training may change when it goes on; a length only for a training by time."""


@dataclass(frozen=True, kw_only=True)
class DistillRequest:
    """Means of a training; either updates or minutes are given.

    Attributes:
        updates: of the weights.
        minutes: of training, without what is made before it.
        prompts: of the trajectories; of the demo checkpoint its own if empty.
        runs: trajectories of the teacher that states are taken from, each of a prompt and a seed.
        settings: of the schedule that will be deployed, such as steps, where they differ from the
            checkpoint's defaults.
        size: side of the images in pixels; None: the checkpoint's own.
        data: folder of pictures with captions, or WebDataset shards, for the task loss; None trains
            without any.
        license: of the data, as told; for the record.
        to_steps: denoising steps that the student learns to need, with guidance folded in; None
            leaves the schedule as it is.
        fold_guidance: fold guidance into the student, and leave the number of steps as it is.
        scales: lowest and highest guidance scale that a student learns which guidance is folded
            into, and then takes as an input, with to_steps; (): that of the runs alone.
        batch: rows of latents per forward pass.
        accumulation: forward passes per update.
        rate: peak learning rate.
        warmup: updates over which it rises.
        cooldown: share of the training at whose end it falls to zero.
        clip: largest norm of the gradient.
        precision: of the student's forward pass; its weights are float32.
        teacher_precision: of the teacher's weights.
        checkpointing: compute activations again in the backward pass, which saves memory.
        decay: of the moving average of the weights, which is what is written.
        min_snr: gamma of min-SNR weighting (Hang et al. 2023); None weighs all timesteps alike.
        weights: by name of a loss term, relative to the scale that makes its first values equal to
            those of the prediction; 0 leaves it out.
        guided: share of batches in which guided predictions are compared.
        block_drop: probability with which a block of the student is left out of an update, so that
            one student serves smaller budgets too.
        first_phase: share of the training in which only what is beside a removal is trained.
        lora_rank: of the updates of what is frozen in the first phase, which is then never trained
            whole; 0: none.
        seed: of all random choices.
        save_every: updates between two states to resume from.
        sample_every: updates between two sample images in the log; 0 draws none.
        log: folder of TensorBoard's log; None writes none.
        work: folder of states and of the training's own state, for further trainings of the same
            teacher; None: a hidden sibling of the target, deleted at the end.
        overwrite: replace a student of another training that is at the target.
        quiet: show no progress.

    Raises:
        SettingsError: see check_fields(); a number is out of range; or there are both updates and
            minutes, or neither.
    """

    updates: int | None = None
    minutes: float | None = None
    prompts: tuple[str, ...] = ()
    runs: int = 256
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    data: str | None = None
    license: str | None = None
    to_steps: int | None = None
    fold_guidance: bool = False
    scales: tuple[float, ...] = ()
    batch: int = 16
    accumulation: int = 1
    rate: float = 1e-4
    warmup: int = 20
    cooldown: float = 0.3
    clip: float = 1.0
    precision: Precision = "fp32"
    teacher_precision: Precision = "fp32"
    checkpointing: bool = False
    decay: float = 0.999
    min_snr: float | None = 5.0
    weights: Mapping[str, float] = field(default_factory=dict)
    guided: float = 0.15
    block_drop: float = 0.0
    first_phase: float = 0.3
    lora_rank: int = 0
    seed: int = 0
    save_every: int = 200
    sample_every: int = 0
    log: Path | None = None
    work: Path | None = None
    overwrite: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_incomplete(cast("Request", self.settings), self.prompts)
        if (self.updates is None) == (self.minutes is None):
            raise SettingsError("a training has one length: give updates or minutes")
        self._check_counts()
        self._check_numbers()

    @property
    def folds(self) -> bool:
        """True if guidance is folded into the student."""
        return self.to_steps is not None or self.fold_guidance

    @property
    def content(self) -> dict[str, Any]:
        """Fields that the result depends on, as plain values."""
        fields = {k: v for k, v in asdict(self).items() if k not in _WITHOUT_EFFECT}
        return fields | {"updates": self.updates}

    def _check_counts(self) -> None:
        check_optional_count("updates", self.updates, _MAX_UPDATES)
        check_optional_count("size", self.size, _MAX_SIZE)
        check_optional_count("to_steps", self.to_steps, CONSISTENCY_STEPS)
        check_count("runs", self.runs, _MAX_RUNS)
        check_count("batch", self.batch, _MAX_ROWS)
        check_count("accumulation", self.accumulation, _MAX_ROWS)
        check_count("save_every", self.save_every, _MAX_UPDATES)
        for name in ("warmup", "sample_every", "lora_rank"):
            check_number(name, getattr(self, name), 0, _MAX_UPDATES)
        check_number("lora_rank", self.lora_rank, 0, _MAX_RANK)
        check_number("seed", self.seed, 0, 2**63 - 1)

    def _check_numbers(self) -> None:
        if self.minutes is not None:
            check_number("minutes", self.minutes, 0.01, _MAX_MINUTES)
        for name in _SHARES:
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_number("rate", self.rate, 1e-12, 10.0)
        check_number("clip", self.clip, 1e-6, 1e6)
        check_number("decay", self.decay, 0.0, 0.999999)
        if self.min_snr is not None:
            check_number("min_snr", self.min_snr, 1.0, 1e6)
        self._check_scales()
        for name, weight in self.weights.items():
            check_number(f"weight of {name}", weight, 0.0, 1e6)

    def _check_scales(self) -> None:
        if self.scales and self.to_steps is None:
            raise SettingsError("scales are learned by students of fewer steps alone: add to_steps")
        if len(self.scales) not in (0, 2):
            raise SettingsError(f"scales takes the lowest and the highest, not {len(self.scales)}")
        for scale in self.scales:
            check_number("scales", scale, 1.0, _MAX_SCALE)
