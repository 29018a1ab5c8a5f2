"""Which worker a conversation's work is offered to, and when that worker may take it. No message server."""

from __future__ import annotations

import secrets
from dataclasses import replace

from lacre_fabric.nats.affinity import MAX_OFFERED, MAX_RANKED, MAX_SHUNNED, MAX_UNANSWERED, SHUNNED, Shunned, in_turn
from lacre_fabric.nats.model_queue import QUIET, ModelQueue
from lacre_fabric.nats.roles import MAX_PROCESSES
from lacre_fabric.work.presence import Presence, Roster

NODES = ("n1", "n2")


def conversation(*turns: str) -> bytes:
    """An affinity for which the workers have these turns."""
    while True:
        affinity = secrets.token_bytes(16)
        if in_turn(affinity, dict.fromkeys(NODES, 1)) == list(turns):
            return affinity


def test_a_conversation_moves_only_if_its_worker_comes_or_goes() -> None:
    conversations = [secrets.token_bytes(16) for _ in range(300)]
    free = {f"n{number}": 1 for number in range(5)}
    first = {one: in_turn(one, free)[0] for one in conversations}
    assert {node: list(first.values()).count(node) > 20 for node in free} == dict.fromkeys(free, True)
    fewer = {node: slots for node, slots in free.items() if node != "n3"}
    moved = [one for one in conversations if in_turn(one, fewer)[0] != first[one]]
    assert moved == [one for one in conversations if first[one] == "n3"]
    assert [in_turn(one, fewer)[0] for one in moved] == [in_turn(one, free)[1] for one in moved]


def test_no_other_worker_is_asked_in_place_of_a_busy_one() -> None:
    affinity = conversation("n1", "n2")
    assert in_turn(affinity, {"n1": 0, "n2": 1}) == []
    assert in_turn(affinity, {"n1": 1, "n2": 0}) == ["n1"]
    assert in_turn(affinity, {}) == []


def test_a_worker_has_few_offers_to_answer_at_once() -> None:
    """All are on its connection, and NATS ends one for which too many bytes wait."""
    affinity, free = conversation("n1", "n2"), {"n1": 100, "n2": 2}
    assert in_turn(affinity, free, {"n1": MAX_UNANSWERED - 1}) == ["n1", "n2"]
    assert in_turn(affinity, free, {"n1": MAX_UNANSWERED}) == []
    assert in_turn(affinity, free, {"n1": 0, "n2": 2}) == ["n1"]
    assert MAX_UNANSWERED * MAX_OFFERED * 3 * MAX_PROCESSES < 64 * 2**20, "of three gateways"


def test_invented_workers_are_not_ranked() -> None:
    free = {f"n{number}": 1 for number in range(MAX_RANKED)}
    assert len(in_turn(b"a", free)) == 2
    assert in_turn(b"a", {**free, "one more": 1}) == []


def test_a_worker_that_leaves_offers_unanswered_is_asked_less_and_less() -> None:
    now = [0.0]
    shunned, free = Shunned(lambda: now[0]), {"n1": 1, "n2": 1}
    shunned.answered("r", "n1")
    assert shunned.without("r", free) == free
    pause = SHUNNED
    for _ in range(12):
        for _ in range(2):  # the second was open at the same time
            shunned.add("r", "n1")
        now[0] += pause - 1
        shunned.answered("r", "n1")
        assert (shunned.without("r", free), shunned.without("elsewhere", free)) == ({"n2": 1}, free)
        now[0] += 1
        assert shunned.without("r", free) == free
        pause = min(2 * pause, MAX_SHUNNED)
    shunned.answered("r", "n1")
    shunned.add("r", "n1")
    now[0] += SHUNNED
    assert shunned.without("r", free) == free


def test_a_worker_of_before_takes_no_offers() -> None:
    said = Presence.parse(b'{"models": ["m"], "busy": 0, "free": 1}')
    roster = Roster()
    roster.hear("r", "n1", said)
    roster.hear("r", "n2", replace(said, offers=True))
    assert roster.offered("m", "r") == {"n2": 1}
    assert (roster.offered("m", "elsewhere"), roster.offered("other", "r")) == ({}, {})
    roster.silenced("r", "n2")
    assert (roster.offered("m", "r"), roster.free("m")) == ({}, {"r": 2})


def test_a_queue_is_quiet_after_pulls_in_vain() -> None:
    queue = ModelQueue("m1", pull=None)  # type: ignore[arg-type]  # its state needs no connection
    assert not queue.quiet(1.0, waits=True)
    queue.pulling(1.0)
    assert [queue.quiet(1.0 + after, waits=True) for after in (QUIET / 2, QUIET)] == [False, True]
    queue.empty(3.0)
    assert [queue.quiet(3.0 + after, waits=False) for after in (QUIET / 2, QUIET)] == [True, False]
    queue.pulling(3.0 + QUIET / 2)
    assert queue.quiet(3.0 + QUIET / 2, waits=True)
    queue.empty(5.0)
    queue.pulling(5.1 + QUIET)  # the worker was full in between: there may be work by now
    assert not queue.quiet(5.1 + QUIET, waits=True)
    queue.brought()
    queue.pulling(5.1 + QUIET)
    assert not queue.quiet(5.1 + QUIET, waits=True)


def test_a_queue_is_not_quiet_after_what_says_nothing_of_it() -> None:
    for tell in (ModelQueue.unknown, lambda queue: queue.silent(2.0)):
        queue = ModelQueue("m1", pull=None)  # type: ignore[arg-type]  # as above
        queue.pulling(1.0)
        assert queue.quiet(2.0, waits=True)
        tell(queue)
        assert not queue.quiet(2.0 + QUIET, waits=True)
        queue.empty(3.0)  # the pull of before
        assert not queue.quiet(3.0, waits=False)
        queue.pulling(3.0)
        assert [queue.quiet(3.0 + after, waits=True) for after in (QUIET / 2, QUIET)] == [False, True]
