"""The README's commands and Python run as they stand, and its promises name real things."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from latentforge.runtime.sampling.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("latentforge ")]


@pytest.fixture
def workplace(demo_engines: Path, tmp_path: Path) -> Path:
    """A directory as the README's reader has it after the build."""
    for name in ("demo-engines", "demo-exported"):
        (tmp_path / name).symlink_to(demo_engines)
    return tmp_path


def test_commands_run(workplace: Path) -> None:
    """All that need neither a hub nor another build of the engines."""
    made = (" build ", " export ")
    able = [c for c in commands() if " demo-" in c or " bench.json" in c]
    ready = [c for c in able if not any(word in c for word in made)]
    assert len(ready) == 14
    for command in ready:
        result = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=workplace, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    for name in ("owl.png", "report.html"):
        assert (workplace / name).stat().st_size > 1000


def test_every_command_parses() -> None:
    """The ones that need a hub or minutes too: their options exist."""
    from latentforge.__main__ import _parser

    for command in commands():
        _parser().parse_args(shlex.split(command)[1:])


def test_the_recipe_is_one(tmp_path: Path) -> None:
    from latentforge.optimize.recipe import read_recipe

    (written,) = blocks("toml")
    (tmp_path / "mine.toml").write_text(written)
    assert read_recipe(str(tmp_path / "mine.toml")).gate.psnr == 28


def test_every_recipe_is_listed() -> None:
    from latentforge.optimize.recipes import names

    table = README.split("## Recipes")[1].split("```")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(names())


def test_python_runs(workplace: Path) -> None:
    (program,) = blocks("python")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=workplace, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (workplace / "apple.png").exists()


def test_every_cell_of_the_table_is_a_test() -> None:
    """And every test of a family and a task is a cell."""
    pytest.importorskip("diffusers", exc_type=ImportError)
    import test_families as families

    marks = {
        test.__name__: [m for m in test.pytestmark if m.args[0] == "name"][0].args[1]
        for test in (
            families.test_text_to_image,
            families.test_image_to_image,
            families.test_inpainting,
        )
    }
    expected = {f"{test}[{name}]" for test, names in marks.items() for name in names}
    table = README.split("## Models and tasks")[1].split("\n## ")[0]
    assert set(re.findall(r"`(test_\w+\[[\w-]+\])`", table)) == expected
    for name in re.findall(r"`(test_\w+)`", table):
        assert hasattr(families, name)


def test_every_sampler_is_listed() -> None:
    listed = re.search(r"^Samplers: (.*?);", README, re.DOTALL | re.MULTILINE)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) == set(SAMPLERS)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_target_and_extra_is_there() -> None:
    from latentforge.commands.arguments import TARGETS
    from latentforge.runtime.backends import BACKENDS

    section = README.split("## Targets")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`([\w-]+)`", row)[0] for row in rows] == list(TARGETS)
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name, entry in BACKENDS.items():
        assert entry.extra in extras
        assert name == "null" or f"`{name}`" in section
