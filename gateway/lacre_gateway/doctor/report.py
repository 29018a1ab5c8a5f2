"""How findings are told: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lacre_gateway.doctor.findings import Finding, State

_STYLES: Final = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}


def show(findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Prints them. Whether nothing failed."""
    healthy = all(finding.state is not State.FAILED for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
        return healthy
    table = Table("", "check", "found", "what to do", show_lines=False)
    for finding in findings:
        state = Text(finding.state.value, _STYLES[finding.state])
        table.add_row(state, finding.check, Text(finding.detail), Text(finding.remedy))
    Console().print(table)
    return healthy
