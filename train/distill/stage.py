"""Distillation stage: from a teacher and its student to a student that was trained.

1. The teacher is exported, and states of its own trajectories are recorded (training_work.py).
2. The student learns on them what its objective says (objectives.py, trainer.py): the teacher's
   predictions and features, first beside what was removed from it, then everywhere (phases.py);
   or, with guidance folded in, to need fewer steps. Pictures with captions can take the place of
   the trajectories.
3. The average of its weights becomes a checkpoint, with a record (trained_writer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latentforge.export.schedulers import with_class
from latentforge.measure.hardware import describe_machine
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.files import check_target
from latentforge.runtime.progress import Progress
from latentforge.runtime.version import __version__
from latentforge.train.distill.batch import Objective
from latentforge.train.distill.captioned_pictures import CaptionedPictures
from latentforge.train.distill.clean_latents import Positions
from latentforge.train.distill.losses import chosen_weights
from latentforge.train.distill.objectives import ObjectiveInputs, made_objective, terms_of
from latentforge.train.distill.pair import Pair
from latentforge.train.distill.records import DistillRecord
from latentforge.train.distill.request import DistillRequest
from latentforge.train.distill.samples import draw_samples
from latentforge.train.distill.trained_writer import write_trained
from latentforge.train.distill.trainer import StudentTrainer, TrainingSetup, make_accelerator
from latentforge.train.distill.training_noise import TrainingNoise
from latentforge.train.distill.training_work import TrainingWork
from latentforge.train.search.states import States
from latentforge.train.student.writer import TRAINED
from latentforge.train.teacher_work import work_folder

__all__ = ["distill"]

_PARTS = 4  # of the progress, and one less with pictures
_SAMPLES = 4  # images of the log
_SHOWN = 1000  # steps of the training's bar


@checked_arguments
def distill(teacher: str, student: str, target: Path, request: DistillRequest) -> DistillRecord:
    """Train a student of a checkpoint, and write it.

    Args:
        teacher: a diffusers directory, a hub id, or ``demo``.
        student: a checkpoint of the teacher's with a smaller UNet, by search() for example.
        target: the checkpoint to write; it appears complete or not at all.
        request: means.

    Returns:
        The record that the student has as distill.json.

    Raises:
        CheckpointError: a checkpoint is missing or damaged, or they do not belong together.
        SettingsError: there are no prompts, pictures lack captions, a loss term is unknown, the
            memory does not suffice, the work folder holds another training, or three batches in a
            row had NaN.
        TargetError: the target or the work folder cannot be written.
    """
    chosen_weights(request.weights, terms_of(request))
    check_target(target, overwrite=request.overwrite, kind=TRAINED)
    pair = Pair.open(teacher, student)
    data, seed = request.data, request.seed
    pictures = None if data is None else CaptionedPictures.open(data, seed)
    accelerator = make_accelerator(request)
    main = accelerator.is_main_process  # which locks the folder for all
    quiet = request.quiet or not main
    with (
        work_folder(target, request.work, "distill", locks=main) as folder,
        Progress(_PARTS - (pictures is not None), quiet=quiet) as progress,
    ):
        run = _Training(pair, request, accelerator, folder, progress)
        return run.write(run.trained(pictures), target)


class _Training:
    """One training; trained() and write() are called once each."""

    def __init__(
        self,
        pair: Pair,
        request: DistillRequest,
        accelerator: Accelerator,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._pair, self._request, self._accelerator = pair, request, accelerator
        self._folder, self._progress = folder, progress
        self._work = TrainingWork(folder, pair.teacher, request)

    def trained(self, pictures: CaptionedPictures | None) -> StudentTrainer:
        """Return the training after its end."""
        needed = pictures is None or self._request.prompts
        prompts = self._work.prompts() if needed else []
        with self._accelerator.main_process_first(), self._part("export of the teacher"):
            engines = self._work.engines()
        with made_objective(self._inputs(engines, prompts, pictures)) as objective:
            setup = TrainingSetup(
                teacher=self._pair.teacher_network,
                student=self._pair.student_network,
                objective=objective,
                owner=self._pair.digests,
            )
            trainer = StudentTrainer(setup, self._request, self._accelerator, self._folder)
            shown = prompts or _captions(pictures)
            with self._part("training"):
                trainer.run(self._report, self._sampler(engines, shown, objective))
        trainer.finish()
        return trainer

    def write(self, trainer: StudentTrainer, target: Path) -> DistillRecord:
        """Write the student, and return its record."""
        pair, record = self._pair, _record(self._pair, trainer)
        changed = trainer.objective.files(pair.student)
        with self._part("the student"):
            if self._accelerator.is_main_process:
                write_trained(
                    pair.student,
                    pair.student_network.model,
                    target,
                    record,
                    changed,
                    overwrite=self._request.overwrite,
                )
        self._accelerator.wait_for_everyone()
        return record

    def _part(self, name: str) -> AbstractContextManager[None]:
        return self._progress.part(name)

    def _inputs(
        self, engines: Path, prompts: Sequence[str], pictures: CaptionedPictures | None
    ) -> ObjectiveInputs:
        pair, accelerator = self._pair, self._accelerator
        config = pair.teacher.config("scheduler", "scheduler_config.json")
        noise = TrainingNoise.of(with_class(config, pair.teacher.index))
        return ObjectiveInputs(
            request=self._request,
            noise=noise,
            networks=(pair.teacher_network, pair.student_network),
            engines=engines,
            states=lambda: self._states(engines, prompts),
            pictures=pictures,
            positions=Positions(accelerator.process_index, accelerator.num_processes),
        )

    def _states(self, engines: Path, prompts: Sequence[str]) -> States:
        settings, count = self._request.settings, self._progress.count_within
        with self._accelerator.main_process_first(), self._part("runs of the teacher"):
            return self._work.states(engines, prompts, settings, count)

    def _report(self, share: float) -> None:
        self._progress.count_within(int(share * _SHOWN), _SHOWN)

    def _sampler(
        self, engines: Path, prompts: Sequence[str], objective: Objective
    ) -> Callable[[], Any]:
        network, inputs = self._pair.student_network, self._pair.inputs
        shown, settings = prompts[:_SAMPLES], self._request.settings
        return lambda: draw_samples(engines, network, inputs, shown, settings, objective.samples())


def _record(pair: Pair, trainer: StudentTrainer) -> DistillRecord:
    request, counters = trainer.request, trainer.progress
    weights = pair.student_network.model.parameters()
    return DistillRecord(
        version=__version__,
        teacher=pair.teacher.name,
        teacher_sha256=pair.digests["teacher"],
        student=pair.student.name,
        student_sha256=pair.digests["student"],
        request=request.content,
        scales=counters.scales,
        first=trainer.log.first,
        last=trainer.log.last,
        updates=counters.update,
        skipped=counters.skipped,
        trained=trainer.trained,
        parameters=sum(weight.numel() for weight in weights),
        license=request.license,
        seconds=counters.seconds,
        machine=describe_machine(),
    )


def _captions(pictures: CaptionedPictures | None) -> list[str]:
    rows = [] if pictures is None else pictures.take(0, min(_SAMPLES, len(pictures)))
    return [row.caption() for row in rows]
