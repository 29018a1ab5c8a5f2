"""Each case of the matrix in turn."""

from __future__ import annotations

import pytest

from chart.rendering import CASES, Rendered, render


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chart(case: str) -> Rendered:
    return render(case)
