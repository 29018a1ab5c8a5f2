"""Prints results: a list for people, one JSON object for programs.

At a terminal, lines break between words only, so that every path and command can be copied. In a pipe each result is one line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Final

from lacre.cli.output import at_terminal, out, printable, say, say_json
from lacre_gateway.doctor.findings import Finding, State

_STYLES: Final = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}
_NAMES: Final = 20  # characters of the column of names; a longer name only moves its own line
_HELPS: Final = "what to do: "
_STATE: Final = max(len(state) for state in State)
_LEAST: Final = 40  # characters of a line's text; with less room beside the name, the text begins below it


def show(findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Prints them. Returns whether no check failed."""
    healthy = all(finding.state is not State.FAILED for finding in findings)
    if as_json:
        say_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
        return healthy
    names = min(_NAMES, max((len(finding.check) for finding in findings), default=0))
    for finding in findings:
        if at_terminal():
            for line in wrapped(finding, names, out().width):
                out().print(line, style=_STYLES[finding.state], soft_wrap=True)
        else:
            helps = f" | {_HELPS}{finding.remedy}" if finding.remedy else ""
            say(f"{_head(finding, names)}{_plain(finding.detail + helps)}")
    return healthy


def wrapped(finding: Finding, names: int, width: int) -> Iterator[str]:
    """The lines of one result, each of at most `width` characters unless a single word is longer. names: of their column."""
    head = _head(finding, names)
    beside = width - len(head) >= _LEAST
    indent = " " * (len(head) if beside else 2)
    if not beside:
        yield head.rstrip()
    texts = [finding.detail, *([_HELPS + finding.remedy] if finding.remedy else [])]
    for number, text in enumerate(texts):
        first = head if beside and number == 0 else indent
        yield from textwrap.wrap(
            _plain(text), width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )


def _head(finding: Finding, names: int) -> str:
    return f"{finding.state.value:<{_STATE}}  {finding.check:<{names}}  "


def _plain(text: str) -> str:
    return printable(" ".join(text.split()))
