"""Models as people write them with pydantic, in each way that clients send them: what a grammar admits is valid."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.lib._parsing import type_to_response_format_param

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import parse_chat
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import HERMES, Argued, CallReader
from parts.drawing import Unfinished, drawn
from parts.pydantic_models import MODELS

SEEDS = range(5)
# Sets of lists or objects: refused by name where strict.
REFUSED = {"UniqueObjects": "uniqueItems"}
# Sets of any text or number, whose repeated items are told only where an answer is JSON alone: refused as strict tools.
REFUSED_AS_TOOLS = REFUSED.keys() | {"Tags"}
# What pydantic wants beyond the schema that it writes, by which an answer is valid: a decimal in a text, a URL's scheme, a text
# that is JSON, keys that are numbers, and keys that match a pattern where others are not forbidden.
BEYOND = {"Money", "Links", "Moments", "Odd", "Records", "Keyed"}


def grammar(**fields: Any) -> str:
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat(json.dumps(asked).encode()).grammar(HERMES, Grammars()) or ""


def check(name: str, answer: str) -> None:
    if name in BEYOND:
        value = json.loads(answer)
        assert value.keys() >= set(MODELS[name].model_json_schema().get("required", ()))
    else:
        MODELS[name].model_validate_json(answer)


def answers(text: str) -> list[str]:
    found = []
    for seed in SEEDS:
        try:
            found.append(drawn(text, seed))
        except Unfinished:  # of a model that holds itself
            continue
    assert len(found) > 1
    return found


def test_there_are_forty() -> None:
    assert len(MODELS) - len(REFUSED) >= 40


@pytest.mark.parametrize("name", MODELS)
def test_as_openais_parse_sends_them(name: str) -> None:
    form = type_to_response_format_param(MODELS[name])
    if name in REFUSED:
        with pytest.raises(RequestRefused, match=f"'{REFUSED[name]}' at #/properties/"):
            grammar(response_format=form)
        return
    for answer in answers(grammar(response_format=form)):
        check(name, answer)


@pytest.mark.parametrize("name", MODELS)
def test_as_pydantic_writes_them(name: str) -> None:
    """Strict, and not: of a model whose options have defaults, a property that tells them apart may be left out."""
    described = {"name": "m", "schema": MODELS[name].model_json_schema()}
    for strict in (False, True):
        if not (strict and name in REFUSED):
            form = {"type": "json_schema", "json_schema": {**described, "strict": strict}}
            for answer in answers(grammar(response_format=form)):
                check(name, answer)


@pytest.mark.parametrize("name", MODELS)
def test_as_tools(name: str) -> None:
    tool: Any = openai.pydantic_function_tool(MODELS[name], name="answer")
    plain = {"type": "function", "function": {"name": "answer", "parameters": MODELS[name].model_json_schema()}}
    if tool["function"]["parameters"].get("type") != "object":  # a list at the root is no tool's
        return
    for each in (plain,) if name in REFUSED_AS_TOOLS else (tool, plain):
        for answer in answers(grammar(tools=[each], tool_choice={"type": "function", "function": {"name": "answer"}})):
            reader = CallReader(HERMES)
            parts = [*reader.push(answer), *reader.finish()]
            check(name, "".join(part.text for part in parts if isinstance(part, Argued)))
