"""Signals while a command starts: one line or none, and never a traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planted import environment

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
ANNOUNCED = """
import sys
from latentforge import __main__ as entry
class Announce:  # the first import after the handlers are there
    def find_spec(self, name, *_):
        if name == {module!r}:
            print("now", flush=True)
            import time
            time.sleep(20)
sys.meta_path.insert(0, Announce())
sys.exit(entry.main({arguments!r}))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("latentforge.command_line", ["verify", "x"]),
        ("argparse", ["verify", "x"]),
        ("latentforge.commands.bench", ["verify", "x"]),
        ("numpy", ["verify", "x"]),
    ],
)
def test_a_signal_during_imports_ends_in_one_line(
    number: signal.Signals, module: str, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_text("{}")
    program = ANNOUNCED.format(module=module, arguments=arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(PYTHONPATH=SOURCE),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    by = " by SIGTERM" if number == signal.SIGTERM else ""
    assert errors == f"latentforge: interrupted{by}; nothing was left behind\n"
    assert process.returncode == 130
