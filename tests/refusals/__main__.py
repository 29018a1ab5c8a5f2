"""Writes `data/*.json`: the cases that the Python SDK and the npm package run alike.

PYTHONPATH=tests python -m refusals
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from refusals import addresses, answers, documents, outside, proofs, statements
from refusals.form import Case, Said

DATA: Final = Path(__file__).resolve().parent / "data"
Check = Callable[[Mapping[str, Any], Case], Said]
FILES: Final[dict[str, tuple[Callable[[], dict[str, Any]], Check]]] = {
    "addresses": (addresses.cases, addresses.check),
    "answers": (answers.cases, answers.check),
    "configurations": (addresses.config_cases, addresses.check_config),
    "documents": (documents.cases, documents.check),
    "messages": (answers.message_cases, answers.check_message),
    "outside": (outside.cases, outside.check),
    "proofs": (proofs.cases, proofs.check),
    "statements": (statements.cases, statements.check),
}


def text(content: Mapping[str, Any]) -> str:
    """One case a line, so that a change shows the case that changed."""
    head = [f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in content.items() if name != "cases"]
    lines = ",\n".join(f"  {json.dumps(case)}" for case in content["cases"])
    return "{\n" + "".join(head) + ' "cases": [\n' + lines + "\n ]\n}\n"


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, (cases, _) in FILES.items():
        (DATA / f"{name}.json").write_text(text(cases()))


if __name__ == "__main__":
    main()
