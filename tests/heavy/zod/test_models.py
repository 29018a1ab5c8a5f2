"""Schemas as people write them with zod 4, and as Node's own openai package sends them: what a grammar admits is valid."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest

from lacre_backend.api.requests import parse_chat
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.parts import Argued
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.thoughts import AnswerForm
from parts.drawing import Unfinished, drawn

FOLDER: Final = Path(__file__).resolve().parent
SEEDS: Final = range(6)
# What openai's package itself does not take in strict form: tuples, records, what may be left out, keywords not in its list.
NOT_STRICT: Final = {"Affixes", "Encoded", "Tuples", "Records", "Keyed", "Document", "Loose", "Never", "Optionals"}
# zod wants `https:` of it, and writes `format: uri` alone.
BEYOND: Final = {"Http"}


def node(*command: str, given: str = "") -> Any:
    program = [str(shutil.which("node")), "program.mjs", *command]
    done = subprocess.run(program, cwd=FOLDER, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def told() -> dict[str, dict[str, Any]]:
    """Each model's schemas, by the way in which they are sent."""
    subprocess.run([str(shutil.which("npm")), "ci", "--silent"], cwd=FOLDER, check=True)
    return node("schemas")  # type: ignore[no-any-return]


def grammar(**fields: Any) -> str:
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat(json.dumps(asked).encode()).grammar(AnswerForm(HERMES), Grammars()) or ""


def ways(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests: as openai's strict form, where it makes one; as zod writes the schema, strict and not; and as tools."""
    named = {"type": "function", "function": {"name": "answer"}}
    found = [] if "refused" in model["format"] else [{"response_format": model["format"]}]
    found += [] if "refused" in model["tool"] else [{"tools": [model["tool"]], "tool_choice": named}]
    for schema in (model["plain"], model["draft7"]):
        for strict in (True, False):
            described = {"name": "answer", "strict": strict, "schema": schema}
            function = {"name": "answer", "strict": strict, "parameters": schema}
            found.append({"response_format": {"type": "json_schema", "json_schema": described}})
            found.append({"tools": [{"type": "function", "function": function}], "tool_choice": named})
    return found


def answer(text: str, fields: dict[str, Any]) -> str:
    if "tools" not in fields:
        return text
    reader = CallReader(HERMES, ["answer"], "seed")
    return "".join(part.text for part in [*reader.push(text), *reader.finish()] if isinstance(part, Argued))


def test_every_answer_that_is_admitted_is_valid(told: dict[str, dict[str, Any]]) -> None:
    assert len(told) >= 45
    answers: dict[str, list[str]] = defaultdict(list)
    for name, model in told.items():
        assert ("refused" in model["format"]) == (name in NOT_STRICT), (name, model["format"])
        for fields in ways(model):
            source, made = grammar(**fields), 0
            for seed in SEEDS:
                try:
                    answers[name].append(answer(drawn(source, seed), fields))
                    made += 1
                except Unfinished:  # of a model that holds itself
                    continue
            assert made > 1, name
    wrong = node("check", given=json.dumps(answers))
    assert [each for each in wrong if each[0] not in BEYOND] == []


def test_the_lock_names_no_registry() -> None:
    assert "resolved" not in (FOLDER / "package-lock.json").read_text()
