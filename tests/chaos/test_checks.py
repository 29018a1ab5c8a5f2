"""Each check is silent where all is well, and goes red on an outcome that was doctored."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chaos import checks
from chaos.findings import broken, outage, price
from chaos.load import DEADLINE, Ended
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


def test_what_holds_is_not_complained_of() -> None:
    assert not list(checks.ends(ENDS, 3))
    assert not list(checks.receipts(ENTRIES, ENDS))
    assert not list(checks.books(ENTRIES, price(), LINES, KILLED))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"how": "hung"}, "did not end"),
        ({"took": DEADLINE + 1}, "took 91.0 s"),
        ({"how": "error", "error": "KeyError", "typed": False}, "KeyError, which is no error of Lacre's"),
        ({"right": False}, "got another answer"),
        ({"receipts": []}, "whole without a receipt"),
    ],
)
def test_an_end_that_is_none(changes: dict[str, Any], says: str) -> None:
    [wrong] = checks.ends([whole(0), whole(1, **changes)], 2)
    assert says in wrong


def test_a_request_that_nobody_heard_of_again() -> None:
    assert list(checks.ends(ENDS, 4)) == ["4 requests were made, and 3 ended"]


def test_a_digest_with_two_receipts() -> None:
    twice = {**ENTRIES, "g3": [{**intent(1), "request_id": "r9"}, {**outcome(1), "request_id": "r9"}]}
    assert list(checks.receipts(twice, ENDS)) == ["digest enc1 has 2 receipts"]


def test_a_digest_that_answered_two_requests() -> None:
    [wrong] = checks.receipts(ENTRIES, [*ENDS, whole(4, receipts=ENDS[0].receipts)])
    assert wrong == "digest enc0 answered 2 requests"


@pytest.mark.parametrize("receipt", [("enc0", 30, 0, 13), ("enc8", 30, 0, 12)])
def test_a_receipt_that_the_log_does_not_have(receipt: tuple[str, int, int, int]) -> None:
    [wrong] = checks.receipts(ENTRIES, [whole(0, receipts=[receipt])])
    assert receipt[0] in wrong


def test_a_request_whose_gateway_died_has_no_outcome_to_compare() -> None:
    assert not list(checks.receipts(ENTRIES, [*ENDS, whole(3)]))


def test_a_micro_unit_too_much() -> None:
    entries = copy.deepcopy(ENTRIES)
    entries["g1"][1]["money"] += 1
    assert "costs" in " ".join(checks.books(entries, price(), LINES, KILLED))


def test_what_is_gone_from_a_budget_and_stands_on_no_receipt() -> None:
    lines = [line("money_per_month", 3 * COST + 11, [LOST]), *LINES[1:]]
    [wrong] = checks.books(ENTRIES, price(), lines, KILLED)
    assert wrong == f"money_per_month of window {WINDOW}: {3 * COST + 1} is gone from the budgets, and receipts say {3 * COST}"


@pytest.mark.parametrize(("kept", "wrong"), [((1, 1), 0), ((0, 1), 1), ((1, 0), 1)])
def test_of_minutes_the_last_two_are_held_against_the_books(kept: tuple[int, int], wrong: int) -> None:
    minutes = [intent(number) | {"limits": [f"user:p/requests_per_minute@{number}"]} for number in range(3)]
    entries = {"g1": [entry for number in range(3) for entry in (minutes[number], outcome(number))]}
    lines = [line("requests_per_minute", drawn) | {"window": number} for number, drawn in zip((1, 2), kept, strict=True)]
    assert len(list(checks.books(entries, price(), lines, frozenset()))) == wrong


def test_a_lease_that_was_not_given_back() -> None:
    wrong = list(checks.books(ENTRIES, price(), LINES, frozenset()))
    assert wrong and all("did not give back its lease" in each for each in wrong)


def test_a_lease_that_was_given_back_and_is_open_forfeits_nothing() -> None:
    idle = {"holder": "g3.7", "drawn": COST, "used": COST, "lost": False, "forfeited": 0}
    lines = [line("money_per_month", 3 * COST + 10, [LOST, idle]), *LINES[1:]]
    assert not list(checks.books(ENTRIES, price(), lines, KILLED))


def test_sums_that_the_budget_itself_finds_wrong() -> None:
    lines = [{**LINES[0], "wrong": "g2.1: drew 1"}, *LINES[1:]]
    assert list(checks.books(ENTRIES, price(), lines, KILLED)) == ["acme, money_per_month: g2.1: drew 1"]


def test_books_that_nobody_wrote_in() -> None:
    assert "nothing was drawn from any budget" in list(checks.books({}, price(), [], KILLED))


def test_a_log_that_does_not_hold() -> None:
    assert not list(checks.logs({"g1": None}, 1, {}))
    assert "g1 does not hold: a tile" in next(checks.logs({"g1": "a tile"}, 1, {}))
    assert "not covered: rolled back" in next(checks.logs({"g1": None}, 1, {"proof": "rolled back"}))
    assert list(checks.logs({"g1": None}, 0, {})) == ["no client received a proof"]


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


def test_a_leak() -> None:
    sound = Life("g1", 0.0, settled=(100 * MIB, 40), now=(150 * MIB, 50), seen=SETTLED + 60)
    assert not list(checks.lives([sound]))
    assert "g1 held 100 MiB" in next(checks.lives([replace(sound, now=(250 * MIB, 50))]))
    assert "g1 held 40 descriptors" in next(checks.lives([replace(sound, now=(150 * MIB, 90))]))
    assert list(checks.lives([replace(sound, seen=SETTLED + 1)])) == ["no process lived long enough to be judged"]


def test_the_longest_outage_is_between_two_answers() -> None:
    assert outage([whole(0), whole(1, how="error"), whole(7), whole(8)]) == 7.0
