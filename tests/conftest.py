"""Fixtures for every room's tests, and how `pytest -n` shares the tests out."""

from __future__ import annotations

from typing import Final

import hypothesis
import pytest

try:
    from xdist.scheduler import LoadScopeScheduling
except ModuleNotFoundError:  # tests/ecosystem/sdk.lock has no xdist: there, one process runs all tests
    LoadScopeScheduling = None

# How long a case takes is this machine's business: no test is timed.
hypothesis.settings.register_profile("lacre", deadline=None)
hypothesis.settings.load_profile("lacre")

# The files that take longest start first: no process is left alone with one of them at the end.
LONGEST: Final = (
    "tests/gateway/test_processes.py",
    "tests/path/test_processes.py",
)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


if LoadScopeScheduling is not None:

    class FileByFile(LoadScopeScheduling):
        """Keeps a file's tests in one process and in order: many share a server or a model that takes seconds to start."""

        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

    def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FileByFile:
        config.option.loadscopereorder = False  # keeps the order of `pytest_collection_modifyitems`
        return FileByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first in a process that shares the tests with others; in the folders' order otherwise."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _turn(item.nodeid.partition("::")[0]))


def _turn(file: str) -> int:
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)
