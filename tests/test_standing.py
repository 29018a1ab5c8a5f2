"""A stage's cleanup hides no failure of its test, and a cleanup that fails alone fails the test."""

from __future__ import annotations

import pytest

from parts.stage.standing import Standing


def standing() -> Standing:
    """Its cleanup fails."""

    def fail() -> None:
        raise OSError("the disk is gone")

    stage = Standing()
    stage.stack.callback(fail)
    return stage


async def test_a_failure_of_the_test_and_of_its_cleanup() -> None:
    with pytest.raises(AssertionError, match="wrong") as told:
        async with standing():
            raise AssertionError("wrong")
    assert told.value.__notes__ == ["the cleanup failed too: OSError('the disk is gone')"]


async def test_a_cleanup_that_fails_alone() -> None:
    with pytest.raises(OSError, match="disk"):
        async with standing():
            pass
