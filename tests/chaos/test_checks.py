"""Each check is silent where all is well, and goes red on what was doctored. A schedule comes from its seed alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chaos import checks
from chaos.findings import broken, outage, price
from chaos.load import DEADLINE, Ended
from chaos.schedule import CALM, OF_SERVERS, REJOIN, SPARED, WARM_UP, Kind, draw
from chaos.vitals import SETTLED, Life
from lacre_gateway.audit.reader import LogReader
from parts.auditing import written

MIB = 2**20
WINDOW = 676


def whole(number: int, **changes: Any) -> Ended:
    end = Ended(number, "whole", "echo", at=float(number), took=0.5, how="whole", receipts=[(f"enc{number}", 30, 0, 12)])
    return replace(end, **changes)


def intent(number: int) -> dict[str, Any]:
    limits = [f"tenant:p/money_per_month@{WINDOW}", f"tenant:p/tokens_per_day@{WINDOW}", "user:p/concurrent_streams@0"]
    return {"kind": "intent", "decision": "allow", "request_id": f"r{number}", "enc": f"enc{number}", "limits": limits}


def outcome(number: int, **changes: Any) -> dict[str, Any]:
    standard = {
        "kind": "outcome", "request_id": f"r{number}", "outcome": "answered", "receipt": f"hash{number}", "duration": 0.5,
        "prompt_tokens": 30, "cached_tokens": 0, "completion_tokens": 12, "money": price().of(30, 0, 12),
    }  # fmt: skip
    return {**standard, **changes}


def line(limit: str, drawn: int, leases: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"name": "acme", "limit": limit, "window": WINDOW, "drawn": drawn, "leases": list(leases), "wrong": None}


ENDS = [whole(number) for number in range(3)]
ENTRIES = {
    "g1": [intent(0), outcome(0), intent(1), outcome(1)],
    "g2": [intent(2), outcome(2), intent(3), outcome(3, duration=None, receipt=None, prompt_tokens=None, money=None)],
}
COST = price().of(30, 0, 12)
# g2 was killed with ten micro-units and five tokens that nobody used.
LOST = {"holder": "g2.1", "drawn": COST + 10, "used": COST, "lost": True, "forfeited": 10}
LINES = [
    line("money_per_month", 3 * COST + 10, [LOST]),
    line("tokens_per_day", 3 * 42 + 5, [{**LOST, "drawn": 47, "used": 42}]),
    line("concurrent_streams", 4),
]
KILLED = frozenset({"g2"})
SOUND = Life("g1", 0.0, settled=(100 * MIB, 40), now=(150 * MIB, 50), seen=SETTLED + 60)


IDLE = {"holder": "g3.7", "drawn": COST, "used": COST, "lost": False, "forfeited": 0}


def again(number: int) -> dict[str, Any]:
    """A log in which that digest stands under another request."""
    return {**ENTRIES, "g3": [{**entry, "request_id": "r9"} for entry in (intent(number), outcome(number))]}


def dearer() -> dict[str, Any]:
    entries = copy.deepcopy(ENTRIES)
    entries["g1"][1]["money"] += 1
    return entries


def minutes(*kept: int) -> list[dict[str, Any]]:
    """Lines of a limit per minute, of the last two of three."""
    return [line("requests_per_minute", drawn) | {"window": number} for number, drawn in enumerate(kept, 1)]


EACH_MINUTE = {
    "g1": [
        entry
        for number in range(3)
        for entry in (intent(number) | {"limits": [f"user:p/requests_per_minute@{number}"]}, outcome(number))
    ]
}


def books(entries: Any = ENTRIES, lines: Sequence[dict[str, Any]] = LINES, killed: frozenset[str] = KILLED) -> list[str]:
    return list(checks.books(entries, price(), lines, killed))


# What was found, and what is said of it: nothing where all is well.
FOUND: dict[str, tuple[Callable[[], Iterable[str]], list[str]]] = {
    "all ended": (lambda: checks.ends(ENDS, 3), []),
    "an end that hung": (lambda: checks.ends([whole(0, how="hung")], 1), ["did not end"]),
    "an end that took long": (lambda: checks.ends([whole(0, took=DEADLINE + 1)], 1), ["took 91.0 s"]),
    "an error of no type": (
        lambda: checks.ends([whole(0, how="error", error="KeyError", typed=False)], 1),
        ["KeyError, which is no error of Lacre's"],
    ),
    "another answer": (lambda: checks.ends([whole(0, right=False)], 1), ["got another answer"]),
    "no receipt": (lambda: checks.ends([whole(0, receipts=[])], 1), ["whole without a receipt"]),
    "one that nobody heard of again": (lambda: checks.ends(ENDS, 4), ["4 requests were made, and 3 ended"]),
    "receipts that hold": (lambda: checks.receipts(ENTRIES, ENDS), []),
    "a digest with two receipts": (lambda: checks.receipts(again(1), ENDS), ["digest enc1 has 2 receipts"]),
    "a digest that answered two requests": (
        lambda: checks.receipts(ENTRIES, [*ENDS, whole(4, receipts=ENDS[0].receipts)]), ["digest enc0 answered 2 requests"],
    ),
    "a receipt of other counts": (lambda: checks.receipts(ENTRIES, [whole(0, receipts=[("enc0", 30, 0, 13)])]), ["enc0"]),
    "a receipt of no log": (lambda: checks.receipts(ENTRIES, [whole(0, receipts=[("enc8", 30, 0, 12)])]), ["enc8"]),
    "no outcome to compare, as its gateway died": (lambda: checks.receipts(ENTRIES, [*ENDS, whole(3)]), []),
    "books that hold": (books, []),
    "a micro-unit too much": (
        lambda: books(dearer()), [f"request r0 was charged {COST + 1}, and costs {COST}", "is gone from the budgets"],
    ),
    "gone from a budget, and on no receipt": (
        lambda: books(lines=[line("money_per_month", 3 * COST + 11, [LOST]), *LINES[1:]]),
        [f"money_per_month of window {WINDOW}: {3 * COST + 1} is gone from the budgets, and receipts say {3 * COST}"],
    ),
    "of minutes the last two are held": (lambda: books(EACH_MINUTE, minutes(1, 1)), []),
    "of minutes the last but one is wrong": (lambda: books(EACH_MINUTE, minutes(0, 1)), ["window 1"]),
    "of minutes the last is wrong": (lambda: books(EACH_MINUTE, minutes(1, 0)), ["window 2"]),
    "leases that were not given back": (lambda: books(killed=frozenset()), ["did not give back its lease"] * 2),
    "an open lease that was given back": (
        lambda: books(lines=[line("money_per_month", 3 * COST + 10, [LOST, IDLE]), *LINES[1:]]), [],
    ),
    "sums that the budget itself finds wrong": (
        lambda: books(lines=[{**LINES[0], "wrong": "g2.1: drew 1"}, *LINES[1:]]), ["acme, money_per_month: g2.1: drew 1"],
    ),
    "books that nobody wrote in": (lambda: books({}, []), ["nothing was drawn from any budget"]),
    "a log that holds": (lambda: checks.logs({"g1": None}, 1, {}), []),
    "a log that does not": (lambda: checks.logs({"g1": "a tile"}, 1, {}), ["g1 does not hold: a tile"]),
    "a proof that no log covers": (lambda: checks.logs({"g1": None}, 1, {"proof": "rolled back"}), ["covered: rolled back"]),
    "no proof": (lambda: checks.logs({"g1": None}, 0, {}), ["no client received a proof"]),
    "a sound life": (lambda: checks.lives([SOUND]), []),
    "memory that grew": (lambda: checks.lives([replace(SOUND, now=(250 * MIB, 50))]), ["g1 held 100 MiB"]),
    "descriptors that leaked": (lambda: checks.lives([replace(SOUND, now=(150 * MIB, 90))]), ["g1 held 40 descriptors"]),
    "nobody who lived for long": (
        lambda: checks.lives([replace(SOUND, seen=SETTLED + 1)]), ["no process lived long enough to be judged"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_is_said_of(name: str) -> None:
    found, expected = FOUND[name]
    said = list(found())
    assert len(said) == len(expected)
    assert all(part in each for part, each in zip(expected, said, strict=True)), said


async def test_a_proof_whose_entry_the_log_lost(tmp_path: Path) -> None:
    """The log was taken back to what it was before the client was answered."""
    long, short = tmp_path / "long", tmp_path / "short"
    await written(long, 20)
    await written(short, 3)
    reader = LogReader(long)
    header = reader.proof(reader.size - 2).header()
    assert broken([header], {"g1": long}) == {}
    assert "rolled back" in broken([header], {"g1": short})[header]
    assert header in broken([header], {"g2": long})


def test_the_longest_outage_is_between_two_answers() -> None:
    assert outage([whole(0), whole(1, how="error"), whole(7), whole(8)]) == 7.0


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
