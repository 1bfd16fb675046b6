"""Training loop: on one CPU or GPU, or on several by Accelerate's launcher.

Every random choice of an update comes from generators that its number, the process and the seed
determine. So a training that goes on from a state repeats what an undisturbed one does, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latentforge.export.families.parts import UNet
from latentforge.runtime.errors import SettingsError, TargetError
from latentforge.train.distill.batch import Objective, TrainingBatch
from latentforge.train.distill.log import LossLog
from latentforge.train.distill.losses import chosen_weights, relative_scales
from latentforge.train.distill.memory import check_memory, predict_memory
from latentforge.train.distill.module_outputs import droppable, dropped
from latentforge.train.distill.phases import (
    add_low_rank,
    beside_removals,
    merge_low_rank,
    set_phase,
)
from latentforge.train.distill.request import DistillRequest
from latentforge.train.distill.state import TrainingState, load_state, save_state

__all__ = ["StudentTrainer", "TrainingSetup", "make_accelerator"]

_CALIBRATED = 8  # batches that the scales of the terms are taken from
_MAX_SKIPPED = 3  # batches with NaN in a row
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Networks of a training, and what they are trained on.

    Attributes:
        teacher: denoiser.
        student: denoiser, which is changed in place.
        objective: what the student learns.
        owner: what the training depends on, besides the request, such as hashes of weights.
    """

    teacher: UNet
    student: UNet
    objective: Objective
    owner: Mapping[str, Any]


@dataclass
class _Progress:
    """Counters of a training."""

    update: int = 0
    skipped: int = 0
    in_a_row: int = 0
    phase_start: int = 0
    seconds: float = 0.0
    scales: dict[str, float] = field(default_factory=dict)


def make_accelerator(request: DistillRequest) -> Accelerator:
    """Return Accelerate's handle on the devices and processes of this training.

    Raises:
        SettingsError: the precision needs another device, or the training is sharded.
    """
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        precision = _MIXED[request.precision]
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[unused])
    except ValueError as error:
        raise SettingsError(f"precision {request.precision} cannot be had here: {error}") from error
    if accelerator.distributed_type not in _KINDS:
        raise SettingsError(
            f"a training by {accelerator.distributed_type.value} is not supported: use data "
            "parallelism (MULTI_GPU or MULTI_CPU)"
        )
    return accelerator


class StudentTrainer:
    """Training of a student's denoiser; run() does all of it.

    Attributes:
        objective: what the student learns.
        progress: counters.
        log: of the losses.
        trained: number of parameters that are trained now.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        request: DistillRequest,
        accelerator: Accelerator,
        folder: Path,
    ) -> None:
        """Prepare a training, from the state in its folder if there is one.

        Args:
            setup: networks and batches.
            request: means.
            accelerator: see make_accelerator().
            folder: of the states and of losses.jsonl.

        Raises:
            SettingsError: a loss term is unknown, the memory does not suffice, or the folder holds
                the state of another training.
        """
        self.request, self.objective = request, setup.objective
        self._accelerator, self._folder = accelerator, folder
        self._weights = chosen_weights(request.weights, self.objective.terms)
        self._owner = {**setup.owner, "request": request.content}
        restored = load_state(folder, self._owner)
        self.progress, self._started = _Progress(), time.monotonic()
        self._whole = True  # no update is half done
        self._prepare_networks(setup)
        main = accelerator.is_main_process
        self.log = LossLog(folder / "losses.jsonl" if main else None, request.log if main else None)
        if restored is not None:
            self._restore(restored)
        else:
            self.log.rewind(0)
            self.progress.scales = self._calibrate()
        self._position = self.objective.source.state()

    # set-up

    def _prepare_networks(self, setup: TrainingSetup) -> None:
        request, teacher, student = self.request, setup.teacher, setup.student
        torch.manual_seed(request.seed)
        model: Any = student.model
        self._unet: nn.Module = model
        # Where guidance is folded in, all is trained from the start on.
        self._near = () if request.folds else beside_removals(student.model)
        if request.lora_rank:
            add_low_rank(self._unet, self._near, request.lora_rank, self.objective.frozen)
        if request.checkpointing:
            model.enable_gradient_checkpointing()
        self._teacher = teacher.eval().requires_grad_(False)
        self._teacher.to(self._accelerator.device, _DTYPES[request.teacher_precision])
        self._droppable = droppable(student.model) if request.block_drop else ()
        self._prepare_training(student.train())

    def _prepare_training(self, student: UNet) -> None:
        """Make the optimizer and the average; all is trained in the last phase."""
        late = self._set_phase(first=False)
        batch = self.objective.source.draw(self.request.batch, self._generator("memory", 0))
        dtype = _DTYPES[self.request.precision]
        compared = self.objective.compared
        memory = predict_memory(student, late, batch.feeds, dtype, compared)
        check_memory(memory, self._accelerator.device)
        parameters = list(self._unet.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.request.rate, weight_decay=0.0)
        # Processes exchange the gradients of what is trained at this moment.
        self._student, self._optimizer = self._accelerator.prepare(student, optimizer)
        self._average = EMAModel(self._unet.parameters(), decay=self.request.decay)
        self.trained = self._set_phase(first=self._is_first(0.0))

    def _set_phase(self, *, first: bool) -> int:
        return set_phase(self._unet, self._near, self.objective.frozen, first=first)

    def _calibrate(self) -> dict[str, float]:
        """Return the scales of the terms, by the first batches."""
        sums = dict.fromkeys(self._weights, 0.0)
        for number in range(_CALIBRATED):
            batch = self.objective.source.draw(
                self.request.batch, self._generator("calibration", number)
            )
            with torch.no_grad():
                for name, value in self._terms(batch).items():
                    sums[name] += value.item() / _CALIBRATED
        values = torch.tensor([sums[name] for name in sums], device=self._accelerator.device)
        means = self._accelerator.reduce(values, "mean").tolist()
        if not all(map(math.isfinite, means)):
            raise SettingsError(
                "the losses of the student are not finite before any training: use a "
                "--precision of fp32, or another student"
            )
        if not any(means):
            raise SettingsError(
                "the student predicts what its teacher does, so there is nothing to learn: name "
                "one that differs, or teach it to need fewer steps"
            )
        return relative_scales(dict(zip(sums, means, strict=True)), self._weights)

    # one update

    def run(self, report: Callable[[float], None], sample: Callable[[], Any]) -> None:
        """Train to the end.

        Args:
            report: called after each update with the share of the training that is done.
            sample: returns images (count, h, w, 3) of the student as it would be written.

        Raises:
            SettingsError: three batches in a row had NaN, or a picture is damaged.
            TargetError: a state cannot be written.
        """
        self._started = time.monotonic() - self.progress.seconds
        try:
            while (share := self._share()) < 1.0:
                self._advance(share)
                number = self.progress.update
                report(min(1.0, self._share()))
                if number % self.request.save_every == 0:
                    self.save()
                self._sample(number, sample)
        except (KeyboardInterrupt, SettingsError):  # or a picture is damaged
            if self._whole:
                with suppress(TargetError):  # the state before it is left to go on from
                    self.save()
            raise
        finally:
            self.progress.seconds = time.monotonic() - self._started
            self.log.close()
        self.save()

    def _share(self) -> float:
        """Return the share of the training that is done."""
        self.progress.seconds = time.monotonic() - self._started
        if self.request.updates is not None:
            return self.progress.update / self.request.updates
        seconds = torch.tensor(self.progress.seconds, device=self._accelerator.device)
        elapsed: float = self._accelerator.reduce(seconds, "mean").item()
        return elapsed / (60.0 * (self.request.minutes or math.inf))

    def _advance(self, share: float) -> None:
        trained = self._set_phase(first=self._is_first(share))
        if trained != self.trained:
            self.trained, self.progress.phase_start = trained, self.progress.update
        factor = self._factor(share)
        for group in self._optimizer.param_groups:
            group["lr"] = self.request.rate * factor
        values = self._accumulate()
        self._whole = False
        self.progress.update += 1
        if values is None:
            self._skip()
        else:
            self.progress.in_a_row = 0
            self._average.step(self._unet.parameters())
            self.log.add(self.progress.update, {**values, "rate": self.request.rate * factor})
        self._position = self.objective.source.state()
        self._whole = True

    def _accumulate(self) -> dict[str, float] | None:
        """Make one update; None if a batch had NaN, which leaves the weights as they are."""
        count, sums = self.request.accumulation, dict.fromkeys(("loss", *self._weights), 0.0)
        for part in range(count):
            last = part == count - 1
            with ExitStack() as stack:
                if not last:
                    stack.enter_context(self._accelerator.no_sync(self._student))
                stack.enter_context(self._without_blocks())
                terms = self._terms_of_update(part)
                loss = sum((self.progress.scales[n] * t for n, t in terms.items()), torch.zeros(()))
                if not self._is_finite(loss):
                    self._optimizer.zero_grad()
                    return None
                self._accelerator.backward(loss / count)
            for name, value in {"loss": loss, **terms}.items():
                sums[name] += value.item() / count
        return self._step(sums)

    def _step(self, sums: dict[str, float]) -> dict[str, float] | None:
        norm = self._accelerator.clip_grad_norm_(self._unet.parameters(), self.request.clip)
        scaled = self.request.precision == "fp16"  # whose scaler skips infinities itself
        finite = norm is None or scaled or self._is_finite(norm)
        self._whole = False
        if finite:
            self._optimizer.step()
        self._optimizer.zero_grad()
        values = torch.tensor(list(sums.values()), device=self._accelerator.device)
        means = self._accelerator.reduce(values, "mean").tolist()
        return dict(zip(sums, means, strict=True)) if finite else None

    def _is_finite(self, value: Tensor) -> bool:
        """Return True if a value is finite in all processes."""
        bad = (~torch.isfinite(value.detach())).float().reshape(1).to(self._accelerator.device)
        return bool(self._accelerator.reduce(bad, "sum").item() == 0)

    def _skip(self) -> None:
        self.progress.skipped += 1
        self.progress.in_a_row += 1
        if self.progress.in_a_row >= _MAX_SKIPPED:
            raise SettingsError(
                f"{_MAX_SKIPPED} batches in a row had NaN, up to update {self.progress.update}: "
                "start again in another --work folder, with a lower --rate or a --precision of fp32"
            )

    def _terms_of_update(self, part: int) -> dict[str, Tensor]:
        number = self.progress.update * self.request.accumulation + part
        batch = self.objective.source.draw(self.request.batch, self._generator("batch", number))
        torch.manual_seed(_seed(self.request.seed, "dropout", number))
        return self._terms(batch)

    @contextmanager
    def _without_blocks(self) -> Iterator[None]:
        """Leave out random blocks, the same in all processes and parts of an update."""
        chance = torch.Generator().manual_seed(
            _seed(self.request.seed, "drop", self.progress.update)
        )
        rolls = torch.rand(len(self._droppable), generator=chance).tolist()
        rows = zip(self._droppable, rolls, strict=True)
        with dropped(self._unet, [p for p, roll in rows if roll < self.request.block_drop]):
            yield

    def _terms(self, given: TrainingBatch) -> dict[str, Tensor]:
        """Return the unscaled loss terms of a batch."""
        batch = given.to(self._accelerator.device)
        comparison = self.objective.compare(batch, self._predict, self._predict_as_teacher)
        return {name: self.objective.terms[name][1](comparison) for name in self._weights}

    def _predict(self, **feeds: Tensor) -> Tensor:
        output: Tensor = self._student(**feeds)
        return output.float()

    def _predict_as_teacher(self, **feeds: Tensor) -> Tensor:
        dtype = _DTYPES[self.request.teacher_precision]
        placed = {n: v if n == "timestep" else v.to(dtype) for n, v in feeds.items()}
        output: Tensor = self._teacher(**placed)
        return output.float()

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        process = self._accelerator.process_index
        seed = _seed(self.request.seed, purpose, number, process)
        return torch.Generator().manual_seed(seed)

    def _is_first(self, share: float) -> bool:
        return bool(self._near) and share < self.request.first_phase

    def _factor(self, share: float) -> float:
        """Return the learning rate, relative to its peak.

        It rises in each phase: the first moments of a parameter are those of few gradients.
        """
        done = self.progress.update - self.progress.phase_start
        rise = (done + 1) / max(1, self.request.warmup)
        fall = (1 - share) / self.request.cooldown if self.request.cooldown else 1.0
        return max(0.0, min(1.0, rise, fall))

    # states

    def _restore(self, state: TrainingState) -> None:
        groups = _grouped(state.tensors)
        self._unet.load_state_dict(groups["weight"])
        named = list(self._unet.named_parameters())
        shadows = [groups["average"][name] for name, _ in named]
        self._average.shadow_params = [s.to(self._accelerator.device) for s in shadows]
        self._average.optimization_step = int(state.content["averaged"])
        for name, parameter in named:
            moments = {key: groups[key][name] for key in _MOMENTS if name in groups.get(key, {})}
            if moments:
                step = moments.pop("step")
                placed = {key: value.to(parameter) for key, value in moments.items()}
                self._optimizer.state[parameter] = {"step": step, **placed}
        self.progress = _Progress(**state.content["progress"])
        self.trained = int(state.content["trained"])
        self.objective.source.restore(state.content["source"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.content["scaler"])
        self.log.restore(state.content["log"])
        self.log.rewind(self.progress.update)

    def save(self) -> None:
        """Write the state after the last whole update.

        Raises:
            TargetError: it cannot be written; the one before it is left.
        """
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler  # of fp16, on GPUs alone
        state = TrainingState(
            update=self.progress.update,
            owner=self._owner,
            content={
                "progress": vars(self.progress),
                "trained": self.trained,
                "averaged": self._average.optimization_step,
                "source": self._position,
                "scaler": None if scaler is None else scaler.state_dict(),
                "log": self.log.state(),
            },
            tensors=self._tensors(),
        )
        save_state(self._folder, state)

    def _tensors(self) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        shadows = self._average.shadow_params
        for (name, parameter), shadow in zip(self._unet.named_parameters(), shadows, strict=True):
            result |= {f"weight/{name}": parameter, f"average/{name}": shadow}
            moments = self._optimizer.state.get(parameter, {})
            result |= {f"{key}/{name}": moments[key] for key in _MOMENTS if key in moments}
        return result

    def _sample(self, number: int, sample: Callable[[], Any]) -> None:
        every = self.request.sample_every
        if every and number % every == 0 and self._accelerator.is_main_process:
            with self.averaged():
                self.log.images(number, sample())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the student the average of its weights inside of the block."""
        self._average.store(self._unet.parameters())
        self._average.copy_to(self._unet.parameters())
        training = self._unet.training
        try:
            self._unet.eval()
            yield
        finally:
            self._unet.train(training)
            self._average.restore(self._unet.parameters())

    def finish(self) -> None:
        """Give the student the average of its weights for good, without additions of low rank."""
        self._average.copy_to(self._unet.parameters())
        merge_low_rank(self._unet)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        groups.setdefault(kind, {})[name] = tensor
    return groups


def _seed(*parts: object) -> int:
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
