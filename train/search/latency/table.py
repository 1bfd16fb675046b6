"""Table of measured latencies in a file, complete after each measurement."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.runtime.errors import LatentforgeError, ResultsError, SettingsError
from latentforge.runtime.files import read_file, staged_file
from latentforge.runtime.record import Record
from latentforge.train.search.latency.records import Latency, MeasuredStructure, StepSetting

__all__ = ["LatencyTable"]

_MAX_BYTES = 64 << 20


class _StoredTable(Record, frozen=True, kw_only=True):
    """Content of the file."""

    format: Literal[1] = 1
    setting: StepSetting
    measured: tuple[MeasuredStructure, ...]


class LatencyTable:
    """Measured latencies by structure; each is in the file as soon as it is added.

    Attributes:
        path: of the file.
        setting: that all latencies hold for.
    """

    def __init__(self, path: Path, setting: StepSetting) -> None:
        """Read the file if it exists.

        Raises:
            ResultsError: the file is damaged, or no such table.
            SettingsError: it was measured on other engines, another machine, or at another size.
        """
        self.path, self.setting = path, setting
        stored = _read(path) if path.exists() else ()
        if stored and (difference := stored.setting.difference(setting)):
            raise SettingsError(
                f"{path} was measured with {difference}: latencies hold for one setting alone; "
                "name another work folder, or delete this file to measure again"
            )
        measured = stored.measured if stored else ()
        self._latencies = {SearchedStructure(choices=m.choices): m.latency for m in measured}

    def __contains__(self, structure: SearchedStructure) -> bool:
        return structure in self._latencies

    def __getitem__(self, structure: SearchedStructure) -> Latency:
        return self._latencies[structure]

    def __iter__(self) -> Iterator[SearchedStructure]:
        return iter(self._latencies)

    def __len__(self) -> int:
        return len(self._latencies)

    def add(self, structure: SearchedStructure, latency: Latency) -> None:
        """Add a latency, and write the file whole.

        Raises:
            TargetError: the file cannot be written.
        """
        self._latencies[structure] = latency
        measured = (
            MeasuredStructure(choices=dict(each.choices), latency=own)
            for each, own in self._latencies.items()
        )
        table = _StoredTable(setting=self.setting, measured=tuple(measured))
        with staged_file(self.path) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")


def _read(path: Path) -> _StoredTable:
    try:
        return msgspec.json.decode(read_file(path, _MAX_BYTES), type=_StoredTable)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError, LatentforgeError) as error:
        raise ResultsError(
            f"{path} is no table of latencies ({error}): delete it to measure again"
        ) from error
