"""Fixtures for every room's tests."""

import hypothesis
import pytest

# How long a case takes is this machine's business: no test is timed.
hypothesis.settings.register_profile("lacre", deadline=None)
hypothesis.settings.load_profile("lacre")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
