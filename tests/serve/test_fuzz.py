"""Requests that schemathesis derives from the server's own description."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from served import Served, complete_engines, served
from test_http import context_of

schemathesis = pytest.importorskip("schemathesis")

EXCLUDED = ("positive_data_acceptance", "ignored_auth", "use_after_free")
"""Checks that do not hold: a request of the right form may still ask for what no model can do."""

LATE = 504
"""Answer of a server without fault: the deadline of the request itself has passed."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engines = complete_engines(tmp_path_factory.mktemp("fuzz"))
    with served(lambda: context_of(engines)) as found:
        yield found


@pytest.mark.parametrize("examples", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_no_request_is_an_error_of_the_server(server: Served, examples: int) -> None:
    """Requests within the description and outside of it get the answers that it promises."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            fuzz(operation, mode, server, examples)


def fuzz(operation: Any, mode: Any, server: Served, examples: int) -> None:
    """Send requests of one operation, right ones or wrong ones."""
    if mode is schemathesis.GenerationMode.NEGATIVE and not can_be_wrong(operation):
        return
    checks = all_checks()
    excluded = [checks[name] for name in EXCLUDED]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=20)
        meant = [checks["not_a_server_error"]] if answer.status_code == LATE else []
        case.validate_response(answer, excluded_checks=excluded + meant)

    each()


def can_be_wrong(operation: Any) -> bool:
    """Return True if there is more than a path, in which every text is right."""
    return bool(list(operation.query) or list(operation.headers) or list(operation.body))


def all_checks() -> dict[str, Any]:
    from schemathesis.checks import CHECKS

    return {name: CHECKS.get_one(name) for name in CHECKS.get_all_names()}
