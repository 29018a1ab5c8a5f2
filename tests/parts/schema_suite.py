"""The official JSON-Schema-Test-Suite (draft 2020-12, what is required) against the grammars that schemas become.

`python -m parts.schema_suite` prints the table of docs/schemas.md. The suite is no part of this project: it lies beside it, or
where LACRE_SCHEMA_SUITE says.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llguidance import LLMatcher

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import grammar
from lacre_backend.api.schema.patterns import byte_tokenizer

_ROOT: Final = Path(__file__).resolve().parents[2]
_FOLDER: Final = Path(os.environ.get("LACRE_SCHEMA_SUITE") or _ROOT.parent / "shared" / "json-schema-tests")
SUITE: Final = _FOLDER / "tests" / "draft2020-12"


@dataclass
class Row:
    """One file of the suite. order, spelling, format: valid instances that are refused, by the reason."""

    name: str
    schemas: int = 0
    refused: list[str] = field(default_factory=list)
    admitted: int = 0
    order: int = 0
    spelling: int = 0
    format: int = 0
    wrong: list[str] = field(default_factory=list)  # what must not be: invalid and admitted, or valid and refused otherwise


def rows() -> list[Row]:
    return [_row(path) for path in sorted(SUITE.glob("*.json"))]


def _row(path: Path) -> Row:
    row = Row(path.stem)
    for case in json.loads(path.read_text()):
        row.schemas += 1
        try:
            matcher = LLMatcher(byte_tokenizer(), grammar(case["schema"]), log_level=0)
        except RequestRefused as refusal:
            row.refused.append(str(refusal).partition("'")[2].partition("'")[0])
            continue
        assert not matcher.is_error(), (path.stem, case["description"])
        for test in case["tests"]:
            _judge(row, matcher, case, test)
    return row


def _judge(row: Row, matcher: LLMatcher, case: dict[str, Any], test: dict[str, Any]) -> None:
    admitted = admits(matcher, test["data"])
    if admitted and test["valid"]:
        row.admitted += 1
    elif admitted:
        row.wrong.append(f"{case['description']}: {test['description']}: admitted")
    elif test["valid"]:
        if "only an annotation" in test["description"]:
            row.format += 1
        elif any(admits(matcher, other) for other in _reordered(test["data"])):
            row.order += 1
        elif admits(matcher, _respelled(test["data"])):
            row.spelling += 1
        else:
            row.wrong.append(f"{case['description']}: {test['description']}: refused")


def admits(matcher: LLMatcher, value: Any) -> bool:
    read = list(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
    own = matcher.deep_copy()
    return own.try_consume_tokens(read) == len(read) and own.is_accepting()


def _reordered(value: Any) -> Iterator[Any]:
    """The same object in other orders: each member first, and from the last on."""
    if isinstance(value, dict):
        members = list(value.items())
        yield dict(reversed(members))
        for i in range(len(members)):
            yield dict([members[i], *members[:i], *members[i + 1 :]])
            yield dict([*members[:i], *members[i + 1 :], members[i]])


def _respelled(value: Any) -> Any:
    """The same value, with 1 in place of 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_respelled(each) for each in value]
    return {name: _respelled(each) for name, each in value.items()} if isinstance(value, dict) else value


def table(found: list[Row]) -> str:
    lines = [
        "| file of the suite | schemas | enforced | refused, by keyword "
        "| valid instances: taken | other order | other spelling | format |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        refused = ", ".join(f"`{keyword}` {n}" for keyword, n in sorted(Counter(row.refused).items()))
        lines.append(
            f"| {row.name} | {row.schemas} | {row.schemas - len(row.refused)} | {refused} | {row.admitted} "
            f"| {row.order or ''} | {row.spelling or ''} | {row.format or ''} |"
        )
    schemas, refused_all = sum(row.schemas for row in found), sum(len(row.refused) for row in found)
    lines.append(
        f"| **all** | {schemas} | {schemas - refused_all} ({100 * (schemas - refused_all) / schemas:.0f} %) | {refused_all} "
        f"| {sum(row.admitted for row in found)} | {sum(row.order for row in found)} | {sum(row.spelling for row in found)} "
        f"| {sum(row.format for row in found)} |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(rows()))
