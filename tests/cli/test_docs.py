"""Commands and Python of the README and the documentation run, and what they name exists."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentforge.__main__ import main
from latentforge.commands import COMMANDS
from latentforge.runtime.sampling import SAMPLERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_LINES = 200

NEEDS_A_HUB_OR_MINUTES = ("build", "search", "distill", "export", "demo", "serve")
"""Commands that the suite runs elsewhere, that download a checkpoint, or run until a signal."""

LIGHT = ("run", "inspect")
"""Commands whose processes import little, and that are started as their readers do."""

LISTED = re.compile(
    r"`((?:runtime|measure|optimize|export|train|src|tests|benchmarks|docs|demo)/[^`\s]+)`"
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)


def commands(page: str) -> list[str]:
    """Command lines of a page, with continued lines joined."""
    joined = [block.replace("\\\n", " ") for block in blocks(page, "sh")]
    lines = [line.strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line.startswith("latentforge ") and "$" not in line]


def runnable() -> Iterator[str]:
    """Commands that work on the demo's engines, once each, those that make files first."""
    found = [command for page in PAGES for command in commands(name(page))]
    for command in dict.fromkeys(found):
        words = command.split()
        on_demo = words[2] == "bench.json" or any(w.startswith("demo-") for w in words[2:])
        if on_demo and words[1] not in NEEDS_A_HUB_OR_MINUTES:
            yield command


@pytest.fixture
def workplace(quick_demo: Path, tmp_path: Path) -> Path:
    """A directory as the reader has it after ``latentforge build demo demo-engines``."""
    for link in ("demo-engines", "demo-exported"):
        (tmp_path / link).symlink_to(quick_demo)
    return tmp_path


def run_as_they_stand(commands: list[str], errors: Callable[[], str]) -> None:
    """Run commands in turn, most in this process, which has imported torch.

    Each has a test elsewhere that starts a process of its own.
    """
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[1] in LIGHT:
            result = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
            assert result.returncode == 0, f"{command}\n{result.stderr}"
        else:
            assert main(words[1:]) == 0, f"{command}\n{errors()}"


def writes_engines(command: str) -> bool:
    """Return whether a command writes engines, or reads those that another one wrote."""
    engines = {word for word in command.split()[2:] if word.startswith("demo-")}
    return bool(engines - {"demo-engines"})


def ready(*, engines: bool) -> list[str]:
    """Return the commands that write engines or the others, each after those that it needs."""
    chosen = [command for command in runnable() if writes_engines(command) == engines]
    return sorted(chosen, key=lambda command: COMMANDS.index(command.split()[1]))


@pytest.mark.timeout(900)
def test_commands_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that needs neither a hub nor another build runs as it stands."""
    monkeypatch.chdir(workplace)
    commands = ready(engines=False)
    assert len(commands) >= 8
    run_as_they_stand(commands, lambda: capsys.readouterr().err)
    for file in ("owl.png", "report.html"):
        assert (workplace / file).stat().st_size > 1000


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_commands_that_write_engines_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    commands = ready(engines=True)
    assert len(commands) >= 4
    run_as_they_stand(commands, lambda: capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_parses(page: Path) -> None:
    """Options of the commands that need a hub or minutes exist too."""
    from latentforge.command_line import parser

    for command in commands(name(page)):
        parser().parse_args(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("page", ["README.md", "docs/production.md"])
def test_python_runs(workplace: Path, page: str) -> None:
    programs = blocks(page, "python")
    assert programs
    for program in programs:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            cwd=workplace, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, f"{program}\n{result.stderr}"


def test_the_readme_is_one_page() -> None:
    assert len(text("README.md").splitlines()) <= MAX_README_LINES


def test_the_recipe_is_one(tmp_path: Path) -> None:
    from latentforge.optimize.recipe import read_recipe

    (written,) = blocks("docs/recipes.md", "toml")
    (tmp_path / "mine.toml").write_text(written)
    assert read_recipe(str(tmp_path / "mine.toml")).gate.psnr == 28


def test_every_recipe_is_listed() -> None:
    from latentforge.optimize.recipes import names

    table = text("docs/recipes.md").split("```")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(names())


def value(case: Any) -> str:
    """Return a test's only parameter, which has marks where `make thorough` runs it."""
    return str(getattr(case, "values", (case,))[0])


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
            families.test_editing,
            families.test_depth_to_image,
            families.test_upscaling,
        )
    }
    expected = {f"{test}[{value(case)}]" for test, cases in marks.items() for case in cases}
    table = text("docs/models.md").split("\n## ")[0]
    assert set(re.findall(r"`(test_\w+\[[\w-]+\])`", table)) == expected
    for test in re.findall(r"`(test_\w+)`", table):
        assert hasattr(families, test)


def test_every_sampler_is_listed() -> None:
    listed = re.search(r"^Samplers: (.*?);", text("docs/models.md"), re.DOTALL | re.MULTILINE)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) == set(SAMPLERS)
    table = text("README.md").partition("| scheduler of a checkpoint |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(SAMPLERS)


def test_every_command_is_listed() -> None:
    table = text("docs/commands.md").split("```")[0]
    listed = re.findall(r"^\| `latentforge (\w+)", table, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_every_target_and_extra_is_there() -> None:
    from latentforge.commands.arguments import TARGETS
    from latentforge.runtime.backends import BACKENDS

    page = text("docs/targets.md")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [re.findall(r"`([\w-]+)`", row)[0] for row in rows] == list(TARGETS)
    extras = re.findall(r"^([\w-]+) = \[", text("pyproject.toml"), re.MULTILINE)
    for backend, entry in BACKENDS.items():
        assert entry.extra in extras
        assert backend == "null" or f"`{backend}`" in page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page: Path) -> None:
    """``runtime/files.py`` names a file; ``{a,b}`` names several, capitals stand for any name."""
    for listed in LISTED.findall(page.read_text(encoding="utf-8")):
        for path in expanded(listed):
            if not re.search(r"[A-Z]|…", path.split("README")[0]):
                assert list(ROOT.glob(path.rstrip("/"))), f"{name(page)} names {path}"


def expanded(path: str) -> list[str]:
    group = re.search(r"\{([^}]*)\}", path)
    if group is None:
        return [path]
    options = group[1].split(",")
    return [each for one in options for each in expanded(path.replace(group[0], one, 1))]


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", text("mkdocs.yml"), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]}
    assert listed == pages


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", text("README.md"), re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in [*targets, "docs"]:
        assert re.search(rf"^{target}:", text("Makefile"), re.MULTILINE), target
