"""What a worker counts of its requests, while they run and after they end."""

from __future__ import annotations

import time

import pytest

from lacre.asgi import Usage
from lacre_backend.node.work_counts import WorkCounts
from lacre_fabric.work.model_counts import FIRST_OUTPUT, MAX_COUNTED, ModelCounts


def test_a_request_is_counted_while_it_runs_and_once() -> None:
    counts, usage = WorkCounts(), Usage()
    assert counts.now() == {}
    with counts.counting("m", usage):
        assert counts.now() == {"m": ModelCounts(running=1)}
        usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens = 10, 4, 2
        assert counts.now() == {"m": ModelCounts(1, 10, 4, 2)}
        usage.completion_tokens = 5
    assert counts.now() == {"m": ModelCounts(0, 10, 4, 5)}
    assert counts.now() == {"m": ModelCounts(0, 10, 4, 5)}


def test_one_that_fails_is_counted_as_far_as_it_came() -> None:
    counts, usage = WorkCounts(), Usage(7, 0, 3)
    with pytest.raises(ValueError, match="broke"), counts.counting("m", usage):
        raise ValueError("broke")
    assert counts.now()["m"].generated == 3


@pytest.mark.parametrize(("seconds", "place"), [(0.0, 0), (0.3, 9), (8.0, 15), (100.0, 16)])
def test_the_time_to_the_first_token(seconds: float, place: int) -> None:
    counts, usage = WorkCounts(), Usage()
    with counts.counting("m", usage):
        assert sum(counts.now()["m"].first_output) == 0
        usage.first_output = time.monotonic() + seconds
    found = counts.now()["m"]
    assert found.first_output.index(1) == place
    assert sum(found.first_output) == 1
    assert found.seconds == pytest.approx(seconds, abs=0.05 * max(seconds, FIRST_OUTPUT[0]) + 0.01)


def test_no_count_falls_when_an_upstream_corrects_itself() -> None:
    counts, usage = WorkCounts(), Usage(completion_tokens=9)
    with counts.counting("m", usage):
        assert counts.now()["m"].generated == 9
        usage.completion_tokens = 6
    assert counts.now()["m"].generated == 9


def test_models_beyond_the_bound_do_not_displace_those_told_before() -> None:
    counts = WorkCounts()
    for number in range(MAX_COUNTED):
        with counts.counting(f"m{number}", Usage(1)):
            counts.now()
    with counts.counting("one more", Usage(1)):
        pass
    assert set(counts.now()) == {f"m{number}" for number in range(MAX_COUNTED)}
