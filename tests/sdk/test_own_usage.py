"""What a caller has used: `client.usage()` and `lacre usage`, over every answer that a gateway or somebody else may give."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.cli.usage import _row, _text
from lacre.exchange.own_usage import MAX_DOCUMENT, PATH
from parts.chat_app import ChatApp
from parts.commands import run_lacre
from parts.live import Gateway, beside, settings
from parts.relay import Relay, Stream, connect, connect_async
from parts.terminal import at_terminal
from parts.up import LACRE

DAY = {"limit": "tokens_per_day", "scope": "user", "unit": "tokens", "ceiling": 100, "used": 40, "remaining": 60,
       "resets_at": 1_800_057_600.0}  # fmt: skip
MONEY = {"limit": "money_per_month", "scope": "tenant-on-plan", "unit": "micro-units", "ceiling": 250_000_000,
         "used": 8_799_669, "remaining": 241_200_331, "resets_at": None}  # fmt: skip
USED = {"plan": "gold plan", "currency": "EUR", "limits": [DAY, MONEY]}


def saying(*answers: httpx2.Response) -> Relay:
    """A gateway that answers so in turn, and then with the last one."""
    left = list(answers)

    def respond(request: httpx2.Request) -> httpx2.Response | None:
        if request.url.path != PATH:
            return None
        answer = left.pop(0) if len(left) > 1 else left[0]
        return httpx2.Response(answer.status_code, headers=answer.headers, stream=Stream([answer.content]))

    return Relay(ChatApp(), respond=respond)


def told(value: object = USED) -> httpx2.Response:
    return httpx2.Response(200, content=json.dumps(value).encode())


def refused(problem: problems.Problem, **headers: str) -> httpx2.Response:
    return httpx2.Response(problem.status, headers={"content-type": problems.MEDIA_TYPE, **headers}, content=problem.body())


def test_both_clients_read_the_same() -> None:
    """With the access token, unsealed, and without a manifest."""
    relay = saying(told())
    with connect(relay) as client:
        used = client.usage()

    async def later() -> lacre.OwnUsage:
        async with connect_async(relay) as client:
            return await client.usage()

    assert asyncio.run(later()) == used
    assert (used.plan, used.currency) == ("gold plan", "EUR")
    day, money = used.limits
    assert (day.limit, day.ceiling, day.used, day.remaining, day.resets_at) == ("tokens_per_day", 100, 40, 60, 1_800_057_600.0)
    assert (money.in_unit(money.used), day.in_unit(day.used)) == (Decimal("8.799669"), 40)
    assert used.members() == USED
    assert [(each.method, each.url.path, each.headers["authorization"]) for each in relay.requests] == [
        ("GET", PATH, "Bearer t")
    ] * 2


def test_another_token_is_tried_once() -> None:
    tokens = iter(["old", "new", "newer"])
    relay = saying(refused(problems.INVALID_TOKEN), told())
    with connect(relay, token=lambda: next(tokens)) as client:
        assert client.usage().plan == "gold plan"
    assert [each.headers["authorization"] for each in relay.requests] == ["Bearer old", "Bearer newer"]
    tokens = iter("abcdefgh")
    relay = saying(refused(problems.INVALID_TOKEN))
    with connect(relay, token=lambda: next(tokens)) as client, pytest.raises(lacre.Unauthenticated):
        client.usage()
    assert len(relay.requests) == 2


def test_a_gateway_that_is_away_for_a_moment_is_asked_again() -> None:
    relay = saying(refused(problems.UNAVAILABLE, **{"retry-after": "0"}), told())
    with connect(relay) as client:
        assert client.usage().plan == "gold plan"
    relay = saying(refused(problems.UNKNOWN_PLAN, **{"lacre-request-id": "r-1"}))
    with connect(relay) as client, pytest.raises(lacre.Forbidden) as caught:
        client.usage()
    assert (len(relay.requests), caught.value.request_id) == (1, "r-1")


@pytest.mark.parametrize(
    "change",
    [
        {"plan": 1}, {"plan": ""}, {"plan": "a\x1b[2Jb"}, {"plan": "x" * 257}, {"currency": "eur"}, {"currency": None},
        {"currency": "EUR\n"}, {"limits": None}, {"limits": {}}, {"limits": [1]}, {"limits": [{}]},
        {"limits": [DAY, {**DAY, "used": -1}]},
        *({"limits": [{**DAY, name: odd}]} for name in ("ceiling", "used") for odd in (True, 1.5, "1", None, 2**64)),
        *({"limits": [{**DAY, name: odd}]} for name in ("limit", "scope", "unit") for odd in ("", "a b", "A", 1, "\x1b[2J")),
        *({"limits": [{**DAY, "resets_at": value}]} for value in ("1", True, -1, 1e300, float("nan"), float("inf"), 10**400)),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_refused_whole(change: dict[str, Any]) -> None:
    with connect(saying(told({**USED, **change}))) as client, pytest.raises(lacre.InvalidMessage, match="usage"):
        client.usage()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (MAX_DOCUMENT + 1), b'{"plan": null}']
)
def test_bytes_that_are_no_usage(content: bytes) -> None:
    with connect(saying(httpx2.Response(200, content=content))) as client, pytest.raises(lacre.InvalidMessage, match="usage"):
        client.usage()


def test_members_of_a_later_gateway_are_ignored() -> None:
    with connect(saying(told({**USED, "new": 1, "limits": [{**DAY, "new": 2}]}))) as client:
        assert client.usage().limits[0].used == 40


# The command

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with beside(Gateway(saying(told()))) as live:
        yield live


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path) -> Run:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run_lacre("usage", *arguments, env=settings(gateway, tmp_path) | env)

    return run


def test_the_command_in_a_pipe(run: Run) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "plan: gold plan, money in EUR",
        "limit            whose        used      of      left        resets",
    ]
    assert done.stdout.splitlines()[3].split("  ") == [
        "money_per_month", "tenant/plan", "8.799669", "250.00", "241.200331", "-",
    ]  # fmt: skip


def test_the_command_for_programs(run: Run) -> None:
    assert json.loads(run("--json").stdout) == USED


def test_the_command_at_a_terminal_of_80_columns(gateway: Gateway, tmp_path: Path) -> None:
    shown = at_terminal([*LACRE, "usage"], settings(gateway, tmp_path) | {"COLUMNS": "80"})
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", shown)]
    assert max(map(len, lines)) <= 80, lines
    assert next(line.split() for line in lines if "tokens_per_day" in line)[1:3] == ["tokens_per_day", "│"], lines
    assert "money_per_month" in shown and "241.200331" in shown


def test_a_refusal_has_its_exit_code_and_request_id(tmp_path: Path) -> None:
    answer = refused(problems.UNKNOWN_PLAN, **{"lacre-request-id": "r-1"})
    with beside(Gateway(saying(answer))) as live:
        done = run_lacre("usage", "--json", env=settings(live, tmp_path))
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["request_id"] == "r-1"
    assert "plans.toml" in done.stderr


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (Decimal("0.000000"), "0.00"), (Decimal("12.500000"), "12.50"), (Decimal("1E+3"), "1000.00"),
     (Decimal("0.000001"), "0.000001")],
)  # fmt: skip
def test_amounts(amount: int | Decimal, text: str) -> None:
    assert _text(amount) == text


def test_a_clock_that_is_ahead_shows_no_negative_time() -> None:
    limit = lacre.UsedLimit("tokens_per_day", "user", "tokens", 1, 1, 0, time.time() - 500)
    assert _row(limit, time.time())[-1] == "in 0 s"
