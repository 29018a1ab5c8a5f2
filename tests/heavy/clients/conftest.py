"""A running `lacre up` for clients of a real model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parts.both import serving_both
from parts.up import Up


@pytest.fixture(scope="package")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with serving_both(tmp_path_factory.mktemp("up")) as live:
        yield live
