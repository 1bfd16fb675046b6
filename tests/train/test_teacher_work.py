"""Work folders: what is left of them, and what an interrupt says of it."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.interrupts import report
from latentforge.runtime.errors import SettingsError, TargetError, WorkInterrupt
from latentforge.train.teacher_work import work_folder


def test_a_hidden_folder_is_deleted_at_the_end(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", None, "distill") as folder:
        (folder / "file").touch()
    assert folder == tmp_path / ".out.distill" and not folder.exists()


def test_an_empty_folder_is_not_left_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError), work_folder(tmp_path / "out", None, "distill"):
        raise SettingsError("no prompts")
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "out", None, "distill"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_interrupt_says_where_the_work_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentforge.interrupts._reported", threading.Lock())
    monkeypatch.setattr("latentforge.interrupts.signal.signal", lambda *_: None)
    with (
        pytest.raises(WorkInterrupt) as caught,
        work_folder(tmp_path / "out", None, "distill") as folder,
    ):
        (folder / "file").touch()
        raise KeyboardInterrupt("by SIGTERM")
    assert folder.exists() and report(caught.value) == 130
    expected = f"latentforge: interrupted by SIGTERM; the same command goes on from {folder}\n"
    assert capsys.readouterr().err == expected


def test_a_folder_inside_the_target_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(TargetError, match="inside"), work_folder(target, target / "work", "search"):
        pass


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", tmp_path / "work", "distill") as folder:
        with (
            pytest.raises(TargetError, match=r"work is in use by another run: wait until it ends"),
            work_folder(tmp_path / "other", folder, "search"),
        ):
            pass
        with work_folder(tmp_path / "out", folder, "distill", locks=False) as same:
            assert same == folder
    with work_folder(tmp_path / "other", folder, "search"):
        pass
