"""The page on serving, and the dashboard, name what there is."""

import argparse
import json
import re
from pathlib import Path

import pytest

from latentforge.command_line import parser
from latentforge.serve import errors
from latentforge.serve.errors import ServeError
from latentforge.serve.http import body
from latentforge.serve.http.app import all_endpoints
from latentforge.serve.http.context import Context
from latentforge.serve.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "serving.md").read_text("utf-8")


def metric_names() -> set[str]:
    """Return the names of the server's own metrics, as they are collected."""
    families = Metrics.create().registry.collect()
    names = {f.name + ("_total" if f.type == "counter" else "") for f in families}
    return {name for name in names if name.startswith("latentforge_")}


def test_every_metric_is_listed(page: str) -> None:
    table = page.partition("| metric |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = {f"latentforge_{name}" for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert listed == metric_names()


def test_the_dashboard_draws_metrics_that_exist() -> None:
    text = (DOCS / "grafana-dashboard.json").read_text("utf-8")
    assert json.loads(text)["panels"]
    drawn = set(re.findall(r"latentforge_\w+", text)) - {"latentforge_"}
    known = {name + end for name in metric_names() for end in ("", "_bucket", "_sum", "_count")}
    assert drawn and drawn <= known


def test_every_option_is_listed(page: str) -> None:
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {name for a in commands.choices["serve"]._actions for name in a.option_strings}
    table = page.partition("| option |")[2].partition("\n\n")[0]
    assert set(re.findall(r"(--[a-z][\w-]*)", table)) == options - {"-h", "--help", "--debug"}


def test_every_endpoint_is_listed(page: str) -> None:
    service: object = None
    context = Context(service=service, metrics=Metrics.create())  # type: ignore[arg-type]
    table = page.partition("| request |")[2].partition("\n\n")[0]
    for endpoint in all_endpoints(context):
        folder, _, last = endpoint.path.rpartition("/")
        assert endpoint.path in table or (folder in table and f"`{last}`" in table), endpoint.path


def test_every_error_is_listed(page: str) -> None:
    table = page.partition("| status |")[2].partition("\n\n")[0]
    kinds = [k for module in (errors, body) for k in vars(module).values() if isinstance(k, type)]
    for kind in kinds:
        if issubclass(kind, ServeError):
            row = next(row for row in table.splitlines() if f"`{kind.code}`" in row)
            assert f"| {kind.status} |" in row
