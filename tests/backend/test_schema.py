"""JSON schemas as grammars: llama.cpp takes them, what comes out is valid, and what cannot be kept is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre_backend.api import schema
from lacre_backend.api.errors import RequestRefused
from lacre_backend.engine.llama import LlamaEngine
from lacre_backend.engine.protocol import EngineError, Sampling, Task, TaskRefused

MakeTask = Callable[..., Task]
Run = Callable[..., Any]

PERSON = {
    "$defs": {"colour": {"enum": ["red", 'a "quoted" \\ é\n', None, 3]}},
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 6},
        "age": {"type": "integer"},
        "colours": {"type": "array", "items": {"$ref": "#/$defs/colour"}, "minItems": 1, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
        "tall": {"type": ["boolean", "null"], "description": "or unknown"},
    },
    "required": ["name", "colours", "tall"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return (
        {"name", "colours", "tall"} <= value.keys() <= set(PERSON["properties"])  # type: ignore[call-overload]
        and 2 <= len(value["name"]) <= 6
        and 1 <= len(value["colours"]) <= 3
        and all(colour in PERSON["$defs"]["colour"]["enum"] for colour in value["colours"])  # type: ignore[index]
        and value["tall"] in (True, False, None)
        and type(value.get("age", 1)) is int
        and re.fullmatch(r"\d{4}-\d\d-\d\d", value.get("born", "2000-01-01")) is not None
    )


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "person": (PERSON, is_person),
    "optional": (
        {"properties": {"a": {"type": "null"}, "b": {"const": 1}}},
        lambda v: v in ({}, {"a": None}, {"b": 1}, {"a": None, "b": 1}),
    ),
    "number": ({"type": "number"}, lambda v: isinstance(v, int | float)),
    "union": (
        {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": "é"}, "maxItems": 2}]},
        lambda v: v in (True, False) or set(v) <= {"é"},
    ),
    "empty object": ({"type": "object", "additionalProperties": False}, lambda v: v == {}),
    "no items": ({"type": "array", "maxItems": 0}, lambda v: v == []),
    "recursive": (
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
        lambda v: v.keys() == {"next"},
    ),
    "uuid": ({"type": "string", "format": "uuid"}, lambda v: len(v) == 36),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_answers_are_valid(name: str, llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    source, valid = CASES[name]
    whole = 0
    for seed in range(6):
        sampling = Sampling(temperature=1.3, top_p=0.9, seed=seed, grammar=schema.grammar(source))
        tokens, finish = await run(llama, make_task(llama, "JSON: ", max_tokens=60, sampling=sampling, endless=False))
        if finish.reason == "stop":
            whole += 1
            assert valid(json.loads("".join(token.text for token in tokens) + finish.text))
    assert whole > 0, "the limit cut every answer: this test shows nothing"


async def test_json_object(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    sampling = Sampling(temperature=0, grammar=schema.any_object(), logit_bias={llama.tokenize("}")[0]: 8.0})
    tokens, finish = await run(llama, make_task(llama, "A JSON object: ", max_tokens=80, sampling=sampling, endless=False))
    assert finish.reason == "stop"
    assert isinstance(json.loads("".join(token.text for token in tokens) + finish.text), dict)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"type": "integer", "minimum": 3}, "'minimum'"),
        ({"type": "string", "pattern": "^a$"}, "'pattern'"),
        ({"type": "string", "format": "email"}, "format"),
        ({"oneOf": [{"type": "null"}]}, "'oneOf'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "string", "properties": {}}, "'properties'"),
        ({"type": "object", "properties": {"a": {"type": "date"}}}, "schema.a.type"),
        ({"type": "object", "required": ["b"]}, "'b'"),
        ({"type": "object", "required": [["b"]]}, "required"),
        ({"type": "object", "properties": []}, "properties"),
        ({"type": "array", "minItems": 10**9}, "minItems"),
        ({"type": "string", "maxLength": -1}, "maxLength"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "maxLength"),
        ({"type": "string", "minLength": True}, "minLength"),
        ({"enum": []}, "enum"),
        ({"enum": ["a"], "type": "integer"}, "enum"),
        ({"$ref": "https://example.com/schema"}, "$ref"),
        ({"$ref": "#/$defs/none"}, "$ref"),
        ({"$ref": 3}, "$ref"),
        ({"anyOf": []}, "anyOf"),
        ({"items": False}, "schema.items"),
        ({"type": []}, "type"),
        ({"type": {"a": 1}}, "type"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_named(source: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        schema.grammar(source)
    assert said in str(caught.value)
    assert caught.value.param == "response_format"


def test_size_and_depth_are_bounded() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2000)}}
    for source in (deep, wide):
        with pytest.raises(RequestRefused, match="more than"):
            schema.grammar(source)


names = st.text(max_size=6)
values = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6)
schemas = st.recursive(
    st.sampled_from([{}, {"type": "string"}, {"type": "integer"}, {"type": ["number", "null"]}, {"type": "object"}])
    | st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=3))
    | st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 9), st.integers(0, 9)),
    lambda inner: (
        st.builds(
            lambda p, n: {"properties": p, "required": list(p)[:n]},
            st.dictionaries(names, inner, max_size=4),
            st.integers(0, 4),
        )
        | st.builds(lambda i, a, b: {"items": i, "minItems": a, "maxItems": a + b}, inner, st.integers(0, 3), st.integers(0, 3))
        | st.builds(lambda o: {"anyOf": o}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda v: {"type": "object", "additionalProperties": v}, inner)
    ),
    max_leaves=8,
)


@given(source=schemas)
@settings(max_examples=60, deadline=None)
async def test_llama_cpp_takes_every_grammar(source: dict[str, Any], llama: LlamaEngine, make_task: MakeTask) -> None:
    task = make_task(llama, max_tokens=1, sampling=Sampling(grammar=schema.grammar(source)))
    async for _ in llama.submit(task):
        pass


@pytest.mark.parametrize("source", [{"$ref": "#"}, {"anyOf": [{"type": "null"}, {"$ref": "#"}]}])
async def test_a_schema_that_is_only_itself(
    source: dict[str, Any], llama: LlamaEngine, make_task: MakeTask, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TaskRefused) as caught:
        llama.submit(make_task(llama, sampling=Sampling(grammar=schema.grammar(source))))
    assert caught.value.field == "grammar"
    assert capfd.readouterr() == ("", "")


async def test_a_grammar_without_a_way_on(llama: LlamaEngine, make_task: MakeTask, run: Run) -> None:
    # The whole answer is one letter: after it only the end is left.
    task = make_task(llama, max_tokens=5, sampling=Sampling(temperature=0, grammar='root ::= "x"'), endless=False)
    tokens, finish = await run(llama, task)
    assert ("".join(token.text for token in tokens), finish.reason) == ("x", "stop")
    # With every way forbidden, llama.cpp must not be made to accept what its grammar refuses: that would end the process.
    (letter,) = llama.tokenize("x")
    never = {letter: -math.inf}
    with pytest.raises(EngineError, match="grammar"):
        await run(llama, dataclasses.replace(task, sampling=dataclasses.replace(task.sampling, logit_bias=never)))
    _, finish = await run(llama, make_task(llama, max_tokens=2))
    assert finish.completion_tokens == 2, "the engine goes on"
