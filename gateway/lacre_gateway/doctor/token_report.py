"""Prints what `lacre token check` found: lines for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

from lacre.cli.output import date, say, say_json, say_table, until
from lacre_gateway.doctor.token import Permission, TokenReport

_MAX_SHOWN: Final = 300  # characters of a claim; a list of groups may be long
_LAST_TIME: Final = 253_402_300_799  # seconds since the epoch: later times have no date
_TIMES: Final = ("iat", "nbf", "exp")
_GENUINE: Final = {True: "by the issuer's key", False: "not by the issuer's key", None: "not checked"}


def show(report: TokenReport, *, as_json: bool) -> None:
    """Prints it."""
    if as_json:
        say_json(asdict(report))
        return
    say("accepted" if report.accepted else f"refused: {report.reason}")
    say("")
    say_table(("", ""), [row for row in _rows(report) if row[1]])
    if report.accepted and report.may:
        say("")
        say_table(("may", "on", "output tokens"), [_permission(each) for each in report.may])
    elif report.accepted and not report.unchecked:
        say("\nThe rules allow this caller nothing.")


def _rows(report: TokenReport) -> Iterator[tuple[str, str]]:
    yield "problem", report.problem
    yield "expected", report.expected
    yield "what helps", report.remedy
    yield "issuer", report.issuer or "not in the settings"
    yield "its keys", report.key
    yield "signature", _GENUINE[report.genuine]
    yield from ((f"header {name}", _value(value)) for name, value in report.header.items())
    for name, value in report.claims.items():
        moment = f" ({date(value)})" if name in _TIMES and type(value) is int and 0 <= value < _LAST_TIME else ""
        yield f"claim {name}", _value(value) + moment
    if report.principal is not None:
        who = report.principal
        yield "subject", who.subject
        yield "tenant", who.tenant
        yield "groups", ", ".join(who.groups) or "none"
        yield "scopes", ", ".join(who.scopes) or "none"
        yield "plan", report.plan or "unknown: plans.toml does not have it, so every request is refused"
        for whose, limits in report.limits.items():
            yield f"limits, {whose}", ", ".join(f"{name} {most}" for name, most in limits.items())
        yield "proof", "each request needs one, by the key that the token is bound to" if report.bound else "none needed"
    if report.expires_at is not None:
        yield "until", until(report.expires_at)
    yield from (("not checked", each) for each in report.unchecked)


def _permission(each: Permission) -> tuple[str, str, str]:
    return each.action, each.target, "" if each.most is None else f"at most {each.most}"


def _value(value: Any) -> str:
    if value is None:
        return "not in the token"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text)} characters)"
