"""Compare trained students of the demo checkpoint with it, on images that nothing was chosen on.

    python benchmarks/distillation.py students demo-student DIR "uniform pruning" "BK-SDM small"
    latentforge distill demo DIR/uniform-pruning uniform-trained --minutes 60
    python benchmarks/distillation.py compare trained uniform-trained --package PACKAGE --output OUT

``students`` writes structures that a search compared its student with as untrained students, with
weights inherited in the same way. ``compare`` draws images of prompts that neither searches nor
trainings have seen, with seeds of their own: each checkpoint by its own default schedule, in
exported engines. It writes distillation.json, the tables distillation.md and the contact sheet
distillation.png. PACKAGE is the unpacked npm package emoji-datasource-google 16.0.0, which
retrieval needs (``export/demo/score.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from latentforge.export.checkpoint import DEMO, open_checkpoint
from latentforge.export.demo import prompts, score
from latentforge.export.demo.data import pictures
from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.export.stage import export
from latentforge.measure.hardware import describe_machine
from latentforge.measure.quality.intervals import mean, proportion
from latentforge.measure.quality.metrics import compare_pairs, decibels
from latentforge.measure.results import ConfidenceInterval
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.train.search.search_record import SearchRecord
from latentforge.train.search.student_images import error_ratio
from latentforge.train.search.teacher import Teacher
from latentforge.train.student.inherit import student_module
from latentforge.train.student.writer import DISTILL_RECORD, RECORD, write_student
from latentforge.train.teacher_work import TeacherWork

__all__ = ["compare", "held_out_prompts", "main", "write_students"]

_SEED = 1_000_000
"""Seed of the first image, above those of searches (0 and 10,000 on) and trainings (0 on)."""

_PROMPTS_SEED = 7
_SEARCHED = (4, 0), (16, 1)  # numbers and seeds of the prompts of a search
_STATES = 4  # prompts that a search measures the importance of channels on
_BATCH = 16
_SHOWN = 12  # images of the contact sheet, and their sides and the space between them in pixels
_SIDE, _GAP, _HEAD = 96, 4, 16

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DrawnImages:
    """Images of a checkpoint for the held-out prompts.

    Attributes:
        name: of the checkpoint's directory, or ``demo``.
        schedule: sampler, steps and guidance that it was drawn by.
        images: one per prompt.
        latents: (images, channels, h, w), final ones.
        color: (images,) 1 where the border has the named color.
        retrieval: (images,) 1 where the nearest training image is of the named object.
    """

    name: str
    schedule: str
    images: Sequence[Image.Image]
    latents: Array
    color: Array
    retrieval: Array


@dataclass(frozen=True, kw_only=True)
class StudentScores:
    """Images of a student beside the teacher's of the same prompts and seeds.

    Attributes:
        student: its images.
        teacher: those of the teacher.
    """

    student: DrawnImages
    teacher: DrawnImages

    @cached_property
    def pairs(self) -> Mapping[str, Array]:
        """Metrics of each pair: see compare_pairs()."""
        return compare_pairs(self.teacher.images, self.student.images, {})

    @cached_property
    def latents(self) -> Array:
        """(images,) squared differences of the final latents, relative to the teacher's."""
        reference, axes = self.teacher.latents, (1, 2, 3)
        power = np.maximum(np.square(reference).mean(axis=axes), 1e-12)
        return np.asarray(np.square(self.student.latents - reference).mean(axis=axes) / power)

    @property
    def figures(self) -> dict[str, ConfidenceInterval]:
        """All figures by name, with 95 % intervals."""
        own, teacher = self.student, self.teacher
        figures = {"color": _share(own.color), "retrieval": _share(own.retrieval)}
        if own is teacher:
            return figures
        return figures | {
            "color kept": error_ratio(own.color, teacher.color),
            "retrieval kept": error_ratio(own.retrieval, teacher.retrieval),
            "PSNR, dB": mean(self.pairs["error"], scale=decibels),
            "SSIM": mean(self.pairs["ssim"]),
            "error of latents": mean(self.latents),
        }


_COLUMNS = {
    **{"color": 100, "retrieval": 100, "color kept": 100, "retrieval kept": 100},
    **{"PSNR, dB": 1, "SSIM": 1, "error of latents": 1},
}
"""Columns of the table, and what their figures are multiplied by."""


def write_students(searched: Path, target: Path, names: Sequence[str]) -> None:
    """Write structures of a search as untrained students of the demo, into folders of a directory.

    Args:
        searched: the student of ``latentforge search demo``.
        target: directory of the students, each in a folder of its name with hyphens.
        names: of structures in the record of the search.

    Raises:
        SettingsError: the record has no such structure.
        TargetError: a student exists.
    """
    record = msgspec.json.decode((searched / RECORD).read_bytes(), type=SearchRecord)
    points = {point.name: point for point in record.points}
    if missing := [name for name in names if name not in points]:
        raise SettingsError(f"no structure {missing[0]!r} in {searched}; {', '.join(points)}")
    teacher = Teacher.open(DEMO)
    with tempfile.TemporaryDirectory(prefix="latentforge-students-") as folder:
        work = TeacherWork(Path(folder), teacher.checkpoint, None)
        texts = prompts(_STATES, seed=0)
        states = work.states(work.engines(), texts, {}, lambda done, total: None)
    importance = teacher.importance(states)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        structure = SearchedStructure(choices=points[name].choices)
        student = student_module(teacher.network.model, structure, importance)
        content = msgspec.to_builtins(points[name])
        write_student(teacher.checkpoint, student, target / name.replace(" ", "-"), content)


def held_out_prompts(students: Sequence[Path], count: int) -> list[str]:
    """Return different prompts of the demo that neither searches nor these trainings used.

    Raises:
        SettingsError: there are not as many.
    """
    used = {text for number, seed in _SEARCHED for text in prompts(number, seed)}
    for student in students:
        used |= _trained_prompts(student)
    every = dict.fromkeys(prompts(100_000, _PROMPTS_SEED))
    unused = [text for text in every if text not in used]
    if count > len(unused):
        raise SettingsError(f"{len(unused)} prompts are unseen: ask for as many at most")
    return unused[:count]


def _trained_prompts(student: Path) -> set[str]:
    """Return the prompts of a student's training; none if it was not trained."""
    if not (path := student / DISTILL_RECORD).exists():
        return set()
    request = json.loads(path.read_bytes())["request"]
    return set(request["prompts"] or prompts(request["runs"], request["seed"]))


def compare(
    students: Sequence[Path], package: Path, count: int, folder: Path
) -> tuple[StudentScores, ...]:
    """Return scores of the demo checkpoint and of its students, in this order.

    Args:
        students: checkpoints.
        package: with the demo's training images.
        count: of images.
        folder: of exported engines, which are made where they are missing.
    """
    texts, originals = held_out_prompts(students, count), pictures(package)
    drawn = []
    for checkpoint in (DEMO, *map(str, students)):
        with load(_engines(checkpoint, folder), hashes=False, example_images=True) as pipeline:
            drawn.append(_draw(Path(checkpoint).name, pipeline, texts, originals))
        print(f"{drawn[-1].name}: drawn", file=sys.stderr, flush=True)
    return tuple(StudentScores(student=each, teacher=drawn[0]) for each in drawn)


def _engines(checkpoint: str, folder: Path) -> Path:
    """Return exported engines, by the name and the weights of a checkpoint."""
    path = folder / f"{Path(checkpoint).name}-{_digest(checkpoint)}"
    if not path.exists():
        export(checkpoint, path)
    return path


def _digest(checkpoint: str) -> str:
    return open_checkpoint(checkpoint).sha256("unet")[:12]


def _draw(
    name: str, pipeline: Pipeline, texts: Sequence[str], originals: NDArray[np.uint8]
) -> DrawnImages:
    images: list[Image.Image] = []
    latents: list[NDArray[Any]] = []
    for chunk in _chunks(texts):
        seeds = [_SEED + len(images) + index for index in range(len(chunk))]
        result = pipeline(chunk, seed=seeds, unaccelerated=True)
        images += result.images
        latents.append(np.asarray(result.latents, np.float64))
    pairs = zip(images, texts, strict=True)
    scores = [score.score([image], [text], originals) for image, text in pairs]
    return DrawnImages(
        name=name,
        schedule=_schedule(pipeline.manifest),
        images=images,
        latents=np.concatenate(latents),
        color=np.array([each.color for each in scores]),
        retrieval=np.array([each.name for each in scores]),
    )


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    rows = iter(texts)
    yield from iter(lambda: list(islice(rows, _BATCH)), [])


def _schedule(manifest: Manifest) -> str:
    defaults = manifest.defaults
    return f"{defaults.sampler}, {defaults.steps} steps, guidance {defaults.guidance_scale:g}"


def _share(correct: Array) -> ConfidenceInterval:
    return proportion(int(correct.sum()), len(correct))


def _table(scores: Sequence[StudentScores]) -> str:
    """Return the figures of all checkpoints as Markdown."""
    rows = [["", "schedule", *(f"{n}, %" if f > 1 else n for n, f in _COLUMNS.items())]]
    rows.append(["---"] * len(rows[0]))
    for each in scores:
        figures = each.figures
        cells = [_cell(figures.get(name), factor) for name, factor in _COLUMNS.items()]
        rows.append([each.student.name, each.student.schedule, *cells])
    return _markdown(rows)


def _ratios(scores: Sequence[StudentScores]) -> dict[str, dict[str, ConfidenceInterval]]:
    """Return the first student's errors relative to each other's, on the same images."""
    _, first, *others = scores
    return {
        each.student.name: {
            "squared error of latents": error_ratio(first.latents, each.latents),
            "squared error of pixels": error_ratio(first.pairs["error"], each.pairs["error"]),
        }
        for each in others
    }


def _ratio_table(first: str, ratios: Mapping[str, Mapping[str, ConfidenceInterval]]) -> str:
    """Return the ratios as Markdown; empty if there are none."""
    if not ratios:
        return ""
    columns = list(next(iter(ratios.values())))
    rows = [[f"{first} relative to", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *map(_cell, row.values())] for name, row in ratios.items()]
    return "\n\n" + _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(interval: ConfidenceInterval | None, factor: float = 1.0) -> str:
    if interval is None:
        return "–"
    values = (interval.value, interval.low, interval.high)
    value, low, high = ("–" if v is None else f"{v * factor:.3g}" for v in values)
    return f"{value} ({low} to {high})"


def _sheet(scores: Sequence[StudentScores]) -> Image.Image:
    """Return images of all checkpoints, a column for each and a row for each prompt."""
    columns = [each.student for each in scores]
    rows = min(_SHOWN, len(columns[0].images))
    pitch = _SIDE + _GAP
    page = Image.new("RGB", (len(columns) * pitch + _GAP, rows * pitch + _HEAD + _GAP), "white")
    for left, column in zip(numbers(_GAP, pitch), columns, strict=False):
        ImageDraw.Draw(page).text((left, 2), column.name[:_HEAD], fill="black")
        for top, image in zip(numbers(_HEAD, pitch), column.images[:rows], strict=False):
            page.paste(image.resize((_SIDE, _SIDE)), (left, top))
    return page


def _write(scores: Sequence[StudentScores], output: Path) -> None:
    """Write the results, and print the tables."""
    ratios = _ratios(scores) if len(scores) > 1 else {}
    content = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine(),
        "images": len(scores[0].student.images),
        "checkpoints": {
            each.student.name: {"schedule": each.student.schedule, **each.figures}
            for each in scores
        },
        "first student relative to": ratios,
    }
    plain = json.dumps(msgspec.to_builtins(content), indent=2)
    tables = _table(scores) + _ratio_table(scores[min(1, len(scores) - 1)].student.name, ratios)
    (output / "distillation.json").write_text(plain + "\n", encoding="utf-8")
    (output / "distillation.md").write_text(tables + "\n", encoding="utf-8")
    _sheet(scores).save(output / "distillation.png")
    print(tables)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    students = commands.add_parser("students", help="write structures of a search as students")
    students.add_argument("searched", type=Path, help="student of latentforge search demo")
    students.add_argument("target", type=Path, metavar="DIR", help="folder of the students")
    students.add_argument("names", nargs="+", metavar="NAME", help="of a structure in its record")
    comparison = commands.add_parser("compare", help="draw and score images")
    comparison.add_argument("students", nargs="*", type=Path, metavar="STUDENT", help="checkpoint")
    comparison.add_argument(
        "--package", type=Path, required=True, help="unpacked emoji-datasource-google 16.0.0"
    )
    comparison.add_argument("--output", type=Path, required=True, help="folder of the results")
    comparison.add_argument("--images", type=int, default=256, help="of each checkpoint")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write students, or compare some."""
    options = _parser().parse_args(arguments)
    if options.command == "students":
        write_students(options.searched, options.target, options.names)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    engines = options.output / "engines"
    _write(compare(options.students, options.package, options.images, engines), options.output)


if __name__ == "__main__":
    main()
