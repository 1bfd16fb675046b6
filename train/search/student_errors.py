"""Errors of students: true ones over recorded states, and scores of choices that add up to them.

The score of a choice is the error of the student that differs from the teacher in it alone. Errors
of several choices are nearly sums of their scores (LAPTOP-Diff, Zhang et al. 2024,
arXiv 2404.11098); how nearly is measured on random structures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentforge.export.families.parts import UNet
from latentforge.export.families.types import ComponentPlan
from latentforge.export.models.searched_structure import (
    Choice,
    Importance,
    SearchedStructure,
    Site,
)
from latentforge.train.search.states import State, States
from latentforge.train.student.inherit import applied

__all__ = [
    "ErrorFile",
    "ChoiceScores",
    "StudentErrors",
    "measure_scores",
    "run_state",
    "single_choices",
]

Array = NDArray[np.float32]


class ErrorFile:
    """File of the errors of structures, each on a line of its own as soon as it is measured.

    A line that was not written completely is measured again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._errors: dict[str, float] = {}
        with suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._errors[str(entry["structure"])] = float(entry["error"])

    def get(self, structure: SearchedStructure) -> float | None:
        """Return the error of a structure; None if it was not measured."""
        return self._errors.get(structure.key)

    def add(self, structure: SearchedStructure, error: float) -> None:
        """Keep an error."""
        self._errors[structure.key] = error
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"structure": structure.key, "error": error}) + "\n")


class StudentErrors:
    """Function from a structure to its student's error over the states, with inherited weights.

    Each structure is measured once; the file keeps the errors for later runs.

    Attributes:
        importance: parts of halved sites that are kept.
        states: to compare on.
        measured: errors of the structures that were asked for.
    """

    def __init__(
        self,
        plan: ComponentPlan,
        network: UNet,
        importance: Importance,
        states: States,
        file: ErrorFile,
    ) -> None:
        """Bind a teacher.

        Args:
            plan: of the denoiser.
            network: the teacher's, whose module is changed during a call and restored after it.
            importance: parts of halved sites that are kept.
            states: to compare on.
            file: of the same teacher, importance and states.
        """
        self.importance, self.states = importance, states
        self.measured: dict[SearchedStructure, float] = {}
        self._plan, self._network, self._file = plan, network, file

    def __call__(self, structure: SearchedStructure) -> float:
        """Return the relative squared error of a structure: see States.error()."""
        error = self._file.get(structure)
        if error is None:
            with applied(self._network.model, structure, self.importance):
                outputs = (run_state(self._network, self._plan, s) for s in self.states.states)
                error = self.states.error(outputs)
            self._file.add(structure, error)
        self.measured[structure] = error
        return error

    @contextmanager
    def student(self, structure: SearchedStructure) -> Iterator[Callable[[State], Array]]:
        """Yield the function from a state to the output of a structure's denoiser."""
        with applied(self._network.model, structure, self.importance):
            yield partial(run_state, self._network, self._plan)

    def parameters(self, structure: SearchedStructure) -> int:
        """Return the parameters of a structure's UNet."""
        with applied(self._network.model, structure, self.importance):
            return sum(weight.numel() for weight in self._network.model.parameters())


def run_state(network: UNet, plan: ComponentPlan, state: State) -> Array:
    """Return the denoiser's output for a state in torch, (rows, channels, h, w)."""
    tensors = {
        name: torch.from_numpy(np.require(state.feeds[name], requirements="W"))
        for name in plan.inputs
    }
    with torch.inference_mode():
        output: Any = network(**tensors)
    array: Array = output.numpy()
    return array


@dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """ChoiceScores of all choices: errors of students that differ from the teacher in one alone.

    Attributes:
        errors: by site and choice, without "keep".
    """

    errors: Mapping[tuple[str, Choice], float]

    def error(self, site: str, choice: Choice) -> float:
        """Return the score of a choice at a site."""
        return 0.0 if choice == "keep" else self.errors[site, choice]

    def total(self, structure: SearchedStructure) -> float:
        """Return the sum of the scores of a structure's choices."""
        return sum(self.error(site, choice) for site, choice in structure.choices.items())


def single_choices(sites: Sequence[Site]) -> list[tuple[str, Choice]]:
    """Return all choices but "keep", by site."""
    return [(site.name, c) for site in sites for c in site.choices if c != "keep"]


def measure_scores(
    error: Callable[[SearchedStructure], float],
    sites: Sequence[Site],
    report: Callable[[int, int], None],
) -> ChoiceScores:
    """Measure the score of every choice.

    Args:
        error: StudentErrors.
        sites: of the teacher.
        report: called after each choice with the number of choices done and their total.
    """
    singles, errors = single_choices(sites), dict[tuple[str, Choice], float]()
    for name, choice in singles:
        errors[name, choice] = error(SearchedStructure.of({name: choice}, sites))
        report(len(errors), len(singles))
    return ChoiceScores(errors=errors)
