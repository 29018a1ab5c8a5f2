"""Prints results: a table for people, one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from lacre.cli.output import say_json, say_table
from lacre_gateway.doctor.findings import Finding, State

_STYLES: Final = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}


def show(findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Prints them. Returns whether no check failed."""
    healthy = all(finding.state is not State.FAILED for finding in findings)
    if as_json:
        say_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
        return healthy
    rows = [(finding.state.value, finding.check, finding.detail, finding.remedy) for finding in findings]
    say_table(("", "check", "found", "what to do"), rows, styles=[_STYLES[finding.state] for finding in findings])
    return healthy
