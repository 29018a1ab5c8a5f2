"""`lacre budget report`: what tenants and users have used, added up from audit logs, also from rotated ones."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import UsageError
from lacre_gateway.audit.entries import Entry, Outcome, encode, parse
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.budget.bill import Bill, bill, groups_of
from parts.auditing import erased, intent, opened, outcome, rotated
from parts.commands import run_lacre

DAY = 1_796_000_000.0  # 2026-11-30, an hour after midnight


def billed(*entries: Entry, by: str = "tenant", **times: float) -> Bill:
    read = (parse(each) for entry in entries for each in encode(entry))
    return bill(read, groups_of(by), times.get("since"), times.get("until"))


def served(number: int, prompt: int = 10, cached: int = 4, completion: int = 2, money: int = 7, **other: Any) -> Outcome:
    amounts = {"prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": completion, "money": money}
    return outcome(number, **{**amounts, **other})


def test_rows_are_what_was_asked_for() -> None:
    entries = [
        intent(1, time=DAY, subject="alice", model="a"), intent(2, time=DAY + 86400, subject="bob", model="a"),
        intent(3, time=DAY, subject="alice", model="b"), intent(4, time=DAY, tenant="other", subject="alice", model="a"),
        *(served(number) for number in (4, 1, 2, 3)),
    ]  # fmt: skip
    found = {by: {place: line.requests for place, line in billed(*entries, by=by).lines.items()} for by in (
        "tenant", "day", "month", "tenant,user", "model,tenant",
    )}  # fmt: skip
    assert found == {
        "tenant": {("acme",): 3, ("other",): 1},
        "day": {("2026-11-30",): 3, ("2026-12-01",): 1},
        "month": {("2026-11",): 3, ("2026-12",): 1},
        "tenant,user": {("acme", "alice"): 2, ("acme", "bob"): 1, ("other", "alice"): 1},
        "model,tenant": {("a", "acme"): 2, ("a", "other"): 1, ("b", "acme"): 1},
    }


def test_what_counts() -> None:
    """A refused request costs nothing; one without a receipt costs what its budget was charged."""
    silent = outcome(
        2, receipt=None, unreceipted=True, prompt_tokens=None, cached_tokens=None, completion_tokens=None, money=50
    )
    refused = outcome(
        3, outcome="refused", status=429, money=None, prompt_tokens=None, cached_tokens=None, completion_tokens=None
    )
    made = billed(*map(intent, (1, 2, 3, 4)), served(1), silent, refused, outcome(9))
    [line] = made.lines.values()
    assert (line.requests, line.refused, line.prompt_tokens, line.cached_tokens, line.completion_tokens, line.money) == (
        2, 1, 10, 4, 2, 57,
    )  # fmt: skip
    assert (made.unplaced, made.open) == (1, 1)


def test_times_are_those_of_the_requests() -> None:
    """From the first moment on, and before the last. An outcome may come later."""
    entries = [*(intent(number, time=DAY + number) for number in range(4)), *map(served, range(4))]
    made = billed(*entries, since=DAY + 1, until=DAY + 3)
    assert [line.requests for line in made.lines.values()] == [2]
    assert (made.unplaced, made.open) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(0, 10**12)), max_size=20))
def test_the_rows_of_any_groups_add_up_to_the_same(requests: list[tuple[str, str, int]]) -> None:
    entries: list[Entry] = []
    for number, (tenant, model, money) in enumerate(requests):
        entries += [intent(number, tenant=tenant, model=model), served(number, money=money)]
    for by in ("tenant", "model", "tenant,model", "day"):
        assert sum(line.money for line in billed(*entries, by=by).lines.values()) == sum(money for _, _, money in requests)


@pytest.mark.parametrize("by", ["", "tenants", "tenant,tenant", "tenant;day", ",", "tenant,"])
def test_groups_that_there_are_not(by: str) -> None:
    with pytest.raises(UsageError, match="at most once"):
        groups_of(by)


async def put(log: AuditLog, *entries: Entry) -> None:
    for entry in entries:
        await log.append(entry)


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_lacre("budget", "report", *arguments)


async def test_the_command_reads_rotated_logs(tmp_path: Path) -> None:
    """A request may begin in one log and end in the next."""
    log = opened(tmp_path / "g1")
    await put(log, intent(1, time=DAY, subject="=cmd"), served(1), intent(2, time=DAY))
    await rotated(log)
    await put(log, served(2, money=1_500_000))
    await log.close()
    arguments = ("--audit", str(tmp_path / "g1"), "--by", "tenant,user,day")
    done = typed(*arguments, "--json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"tenant": "acme", "user": user, "day": "2026-11-30", "requests": 1, "refused": 0, "prompt_tokens": 10,
         "cached_tokens": 4, "completion_tokens": 2, "money": money}
        for user, money in (("=cmd", 7), ("alice", 1_500_000))
    ], done.stderr  # fmt: skip
    rows = list(csv.reader(io.StringIO(typed(*arguments, "--csv").stdout, newline="")))
    assert [(row[1], row[-1]) for row in rows] == [("user", "money"), ("'=cmd", "0.000007"), ("alice", "1.500000")]
    assert typed(*arguments).stdout.splitlines()[2].split() == [
        "acme",
        "alice",
        "2026-11-30",
        "1",
        "0",
        "10",
        "4",
        "2",
        "1.500000",
    ]
    erased(tmp_path / "g1", 1)
    done = typed(*arguments, "--json")
    assert "1 logs of" in done.stderr and "1 outcomes have their request" in done.stderr
    assert done.stdout == ""
    wrong = typed("--audit", str(tmp_path / "none"))
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (1, False), wrong.stderr
    assert len(typed(*arguments, "--since", "2027-01-01").stdout.splitlines()) == 1, "the headings alone"
