"""A schedule comes from its seed alone, and keeps its own rules."""

from __future__ import annotations

from itertools import pairwise

import pytest

from chaos.schedule import CALM, OF_SERVERS, REJOIN, SPARED, WARM_UP, Kind, draw

KINDS: set[Kind] = {
    "kill-gateway", "kill-worker", "kill-server", "stop-gateway", "stop-worker", "stop-server",
    "leader", "partition", "skew", "disk", "keys", "policies",
}  # fmt: skip


def test_the_same_seed_strikes_the_same_way() -> None:
    assert draw(7, 600) == draw(7, 600) != draw(8, 600)


@pytest.mark.parametrize("seed", range(20))
def test_its_rules(seed: int) -> None:
    schedule = draw(seed, 600)
    assert {strike.kind for strike in schedule} == KINDS
    assert [strike.at for strike in schedule] == sorted(strike.at for strike in schedule)
    assert schedule[0].at >= WARM_UP and max(strike.at + strike.lasting for strike in schedule) <= 600 - CALM
    assert not [strike for strike in schedule if strike.kind.startswith("kill") and strike.target in SPARED]
    away = [strike for strike in schedule if strike.kind in OF_SERVERS]
    for before, after in pairwise(away):
        assert after.at >= before.at + before.lasting + REJOIN - 0.02
