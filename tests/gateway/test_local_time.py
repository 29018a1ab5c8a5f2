"""Weekday and local time in rules: the zone of the set, its changes of clock, and files that do not hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lacre_gateway.policy.cases import PolicyCase
from lacre_gateway.policy.cedar import PolicyError
from lacre_gateway.policy.rules import RuleSet
from lacre_gateway.settings import shipped

CHAT = {
    "principal": {"subject": "alice", "tenant": "acme"}, "action": "chat", "pool": "default", "model": "m", "max_tokens": 1,
    "sealed_bytes": 1, "kem": "X25519", "shape": "none",
}  # fmt: skip
RULE = '@id("office") permit (principal, action in Action::"sealed", resource) when { %s };'
OFFICE = "context.weekday <= 5 && context.local_hour >= 8 && context.local_hour < 18"


def made(folder: Path, zone: str | None, condition: str = OFFICE) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(shipped() / "lacre.cedarschema", folder)
    (folder / "x.cedar").write_text(RULE % condition)
    (folder / "no-cases").touch()
    if zone is not None:
        (folder / "time.toml").write_text(zone)
    return folder


def case(**other: Any) -> PolicyCase:
    return PolicyCase.parse("cases/ALLOW/x.json", json.dumps({**CHAT, **other}).encode())


@pytest.mark.parametrize(
    ("zone", "time", "allowed"),
    [
        ("Europe/Berlin", "2026-07-03T06:00:00Z", True),  # 8:00, in summer
        ("Europe/Berlin", "2026-11-27T06:30:00Z", False),  # 7:30, in winter
        ("Europe/Berlin", "2026-11-27T16:59:59.999Z", True),
        ("Europe/Berlin", "2026-11-27T17:00:00Z", False),
        ("Pacific/Auckland", "2026-11-29T20:00:00Z", True),  # there it is Monday
        ("America/New_York", "2026-11-27T23:30:00+01:00", True),  # Friday, 17:30 there
        ("Asia/Kolkata", "2026-11-27T02:29:00Z", False),  # 7:59: half an hour off
        ("Asia/Kolkata", "2026-11-27T02:30:00Z", True),
        ("Europe/Berlin", "2026-11-28T11:00:00Z", False),  # a Saturday
        ("Asia/Tokyo", "2026-11-27T23:30:00Z", False),  # there it is one already
        (None, "2026-11-27T08:00:00Z", True),
        (None, "2026-11-27T18:00:00Z", False),
    ],
)
def test_rules_know_weekday_and_time_in_the_zone_of_their_set(
    tmp_path: Path, zone: str | None, time: str, allowed: bool
) -> None:
    rules = RuleSet.load(made(tmp_path, None if zone is None else f'zone = "{zone}"\n'))
    question = case(time=time).request.question()
    assert rules.policies.decide(question).allowed is allowed
    assert rules.policies.decide(question).allowed is allowed


def test_an_hour_that_comes_twice(tmp_path: Path) -> None:
    """When summer time ends, 2:30 comes twice, and both are 2:30."""
    rules = RuleSet.load(made(tmp_path, 'zone = "Europe/Berlin"', "context.local_hour == 2 && context.local_minute == 30"))
    times = ("2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z")
    assert [rules.policies.decide(case(time=time).request.question()).allowed for time in times] == [True, True, False]


@pytest.mark.parametrize(
    ("zone", "before", "after"),
    [
        ("Europe/Berlin", "2026-03-29T00:59:59.999Z", "2026-03-29T01:00:00Z"),
        ("America/New_York", "2026-03-08T06:59:59Z", "2026-03-08T07:00:00Z"),
    ],
)
def test_an_hour_that_does_not_come(tmp_path: Path, zone: str, before: str, after: str) -> None:
    """When summer time begins, 1:59 is followed by 3:00. A rule for 2 o'clock applies at no moment of that day."""
    rules = RuleSet.load(made(tmp_path, f'zone = "{zone}"', "context.local_hour == 1 && context.local_minute == 59"))
    late = RuleSet.load(made(tmp_path / "late", f'zone = "{zone}"', "context.local_hour == 3 && context.local_minute == 0"))
    decided = [
        (each.policies.decide(case(time=time).request.question()).allowed) for each in (rules, late) for time in (before, after)
    ]
    assert decided == [True, False, False, True]


def test_half_an_hour_of_summer_time(tmp_path: Path) -> None:
    """Lord Howe Island moves its clocks by 30 minutes: on 5 April 2026 at 15:00 UTC the hour from 1:30 to 2:00 comes again."""
    rules = RuleSet.load(
        made(tmp_path, 'zone = "Australia/Lord_Howe"', "context.local_hour == 1 && context.local_minute == 45")
    )
    times = ("2026-04-04T14:45:00Z", "2026-04-04T15:15:00Z", "2026-04-04T15:45:00Z")
    assert [rules.policies.decide(case(time=time).request.question()).allowed for time in times] == [True, True, False]


def test_the_zone_is_part_of_the_set(tmp_path: Path) -> None:
    """Other files, other digest and signature: a gateway reloads it, and an auditor sees it."""
    first = RuleSet.load(made(tmp_path, 'zone = "UTC"'))
    second = RuleSet.load(made(tmp_path, 'zone = "Asia/Tokyo"'))
    assert first.digest != second.digest and first.signature != second.signature
    assert second.policies.zone.name == "Asia/Tokyo"


@pytest.mark.parametrize(
    "text",
    [
        "", 'zone = "Europe/Berlln"', 'zone = ""', 'zone = "../../etc/passwd"', 'zone = "/etc/localtime"', "zone = 1", "zone =",
        'zone = "UTC"\ncolour = 1', 'zone = "Europe"', 'zone = "a\\u0000b"',
    ],
)  # fmt: skip
def test_a_zone_that_there_is_not_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError) as refused:
        RuleSet.load(made(tmp_path, text))
    assert (refused.value.fault, refused.value.place) == ("time", "time.toml")


@pytest.mark.parametrize(
    "other",
    [
        {"time": "2026-11-27T08:00:00"}, {"time": 1}, {"time": "noon"}, {"time": "2026-11-27T08:00:00Z", "hour": 8},
        {"time": "2026-13-27T08:00:00Z"},
    ],
)  # fmt: skip
def test_a_case_with_a_time_that_says_nothing(other: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        case(**other)
