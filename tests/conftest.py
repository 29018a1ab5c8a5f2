"""Fixtures for every room's tests, and how `pytest -n` shares the tests out."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

try:
    import structlog
except ModuleNotFoundError:  # an environment of the SDK alone
    structlog = None

try:
    from sharing import Sharing
except ModuleNotFoundError:  # tests/ecosystem/sdk.lock has no xdist: there, one process runs all tests
    Sharing = None

# How long a case takes is this machine's business: no test is timed.
hypothesis.settings.register_profile("lacre", deadline=None)
hypothesis.settings.load_profile("lacre")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The processes of `pytest -n` must agree on the ids of the cases: an object's address differs in each."""
    odd = [item.nodeid for item in items if " object at 0x" in item.nodeid]
    if odd:
        raise pytest.UsageError(f"give these cases ids of their own: {odd[:3]}")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that a test runs in this process may set up the logs of all."""
    before = None if structlog is None else structlog.get_config()
    yield
    if before is not None:
        structlog.configure(**before)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


if Sharing is not None:

    def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Sharing:
        return Sharing(config, log)
