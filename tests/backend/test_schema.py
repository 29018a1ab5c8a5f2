"""JSON schemas as grammars: what comes out is valid, what is valid may come out, and what cannot be kept is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.generating import made, make_task, run
from lacre_backend.api.compiling import compiled
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import ChatCompletionRequest, ResponseFormat, parse_chat
from lacre_backend.api.schema import grammar as schema
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.thoughts import AnswerForm
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import EngineError, Sampling, TaskRefused

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


# With the real model. schemas_of_others has many more, by the grammar alone.
CASES: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "person": (PERSON, is_person),
    "optional": (
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"const": 1}}, "additionalProperties": False},
        lambda v: v in ({}, {"a": None}, {"b": 1}, {"a": None, "b": 1}),
    ),
    "range": ({"type": "integer", "minimum": 3, "exclusiveMaximum": 20, "multipleOf": 4}, lambda v: v in (4, 8, 12, 16)),
    "several steps": (
        {"type": "number", "minimum": 1, "maximum": 13, "allOf": [{"multipleOf": 0.4}, {"multipleOf": 1.5}]},
        lambda v: v in (6, 12),
    ),
    "one of": (
        {"oneOf": [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 3, "maximum": 9}]},
        lambda v: v < 3 or 5 < v <= 9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_answers_are_valid(name: str, llama: LlamaEngine) -> None:
    source, valid = CASES[name]
    grammar, whole = llama.grammar(schema.grammar(source)), 0
    for seed in range(6):
        sampling = Sampling(temperature=1.3, top_p=0.9, seed=seed, grammar=grammar)
        answer = await made(llama, "JSON: ", max_tokens=60, sampling=sampling, endless=False)
        if answer.finish.reason == "stop":
            whole += 1
            assert valid(json.loads(answer.text))
    assert whole > 0, "the limit cut every answer: this test shows nothing"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=1.0),
        Sampling(temperature=0, repeat_penalty=1.8),
        Sampling(temperature=1.0, seed=3, top_k=4),
    ],
    ids=["greedy", "drawn", "penalised", "seeded"],
)
async def test_every_way_to_choose_keeps_the_grammar(sampling: Sampling, llama: LlamaEngine) -> None:
    """A bias towards what the grammar forbids changes nothing, and logprobs are still the model's own."""
    (letter,) = llama.tokenize("x")
    sampling = dataclasses.replace(sampling, logit_bias={letter: 100.0}, grammar=schema.grammar({"enum": ["yes", "no"]}))
    task = make_task(llama, "Yes or no? ", max_tokens=10, sampling=sampling, endless=False, logprobs=2)
    tokens, finish = await run(llama, task)
    assert "".join(token.text for token in tokens) + finish.text in ('"yes"', '"no"')
    assert finish.reason == "stop"
    assert all(token.logprob <= 0 and len(token.top) == 2 for token in tokens)


def test_a_schema_that_refers_to_itself(llama: LlamaEngine) -> None:
    next_one = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    source = {"type": "object", "properties": {"next": next_one}, "required": ["next"], "additionalProperties": False}
    assert admits(llama, schema.grammar(source), '{"next": {"next": {"next": null}}}')
    assert not admits(llama, schema.grammar(source), '{"next": {"next": {}}}')


async def test_json_object(llama: LlamaEngine) -> None:
    sampling = Sampling(temperature=0, grammar=schema.any_object(), logit_bias={llama.tokenize("}")[0]: 8.0})
    answer = await made(llama, "A JSON object: ", max_tokens=80, sampling=sampling, endless=False)
    assert answer.finish.reason == "stop"
    assert isinstance(json.loads(answer.text), dict)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "format": "postcode"}, "'format' at #"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' at #"),
    ({"type": "object", "properties": {"a": {"type": "date"}}}, "'type' at #/properties/a"),
    ({"type": "object", "required": [["b"]]}, "'required'"),
    ({"type": "object", "properties": []}, "'properties'"),
    ({"type": "array", "minItems": 10**9}, "'minItems'"),
    ({"type": "string", "maxLength": -1}, "'maxLength'"),
    ({"type": "string", "minLength": True}, "'minLength'"),
    ({"type": "string", "minLength": 5, "maxLength": 4}, "allows no value"),
    ({"enum": []}, "'enum'"),
    ({"enum": ["a"], "type": "integer"}, "allows no value"),
    ({"$ref": "https://example.com/schema"}, "'$ref'"),
    ({"$ref": "#/$defs/none"}, "'$ref'"),
    ({"$ref": 3}, "'$ref'"),
    ({"$ref": "#"}, "'$ref'"),
    ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "'$ref'"),
    ({"anyOf": []}, "'anyOf'"),
    ({"type": []}, "'type'"),
    ({"type": {"a": 1}}, "'type'"),
    ({"type": "integer", "minimum": 2**60}, "'minimum'"),
    ({"type": "integer", "multipleOf": 99991}, "'multipleOf'"),
    ({"type": "integer", "multipleOf": -1}, "'multipleOf'"),
    ({"type": "integer", "allOf": [{"multipleOf": n} for n in (7, 11, 13, 17, 19, 23, 29)]}, "'multipleOf'"),
    ({"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "'multipleOf'"),
    ({"prefixItems": [{"type": "integer", "multipleOf": 9973 - i} for i in range(3)], "type": "array"}, "'multipleOf'"),
    ({"type": "string", "pattern": "(?<=a)b"}, "'pattern'"),
    ({"$schema": "https://example.com/own", "type": "string"}, "'$schema'"),
    ({"type": "object", "x-guidance": {"lenient": True}, "uniqueItems": 1}, "'x-guidance' at #"),
    ({"type": "object", "properties": {"a": {"x-guidance": {"coerce_one_of": True}}}}, "'x-guidance' at #/properties/a"),
    ({"type": "object", "minimun": 3}, "'minimun'"),
    ({"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(900)}}, "'properties' at #"),
    ({"anyOf": [{"type": "array", "items": {"maxLength": i}} for i in range(400)]}, "'anyOf' at #"),
]


@pytest.mark.parametrize(("source", "said"), REFUSED, ids=[f"{i}-{said}" for i, (_, said) in enumerate(REFUSED)])
def test_what_cannot_be_kept_is_named(source: dict[str, Any], said: str, llama: LlamaEngine) -> None:
    """Deep inside as at the root: what is refused is refused before anything runs."""
    inside = {"type": "object", "properties": {"deep": source}, "required": ["deep"]}
    for each in (source, inside) if "#" not in json.dumps(source) else (source,):
        form = ResponseFormat.model_validate(
            {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": each}}
        )
        with pytest.raises(RequestRefused) as caught:
            compiled(llama, chat(response_format=form.model_dump(by_alias=True, exclude_none=True)), AnswerForm(HERMES))
        assert said.partition(" at ")[0] in str(caught.value)
        assert said.partition(" at #")[2] in str(caught.value)
        assert caught.value.param == "response_format"


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode())


def test_the_steps_of_all_tools_of_a_request_count_together() -> None:
    grammars = schema.Grammars()
    for _ in range(2):
        grammars.schema({"type": "integer", "multipleOf": 9973}, "tools[0].function.parameters")
    grammars.schema({"type": "number", "multipleOf": 0.01}, "tools[1].function.parameters")
    with pytest.raises(RequestRefused, match="multipleOf"):
        grammars.schema({"type": "integer", "multipleOf": 9967}, "tools[2].function.parameters")


def test_size_and_depth_are_bounded() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(9000)}}
    long = {"enum": ["x" * 600_000]}
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(600)} | {"a600": {"type": "string"}}
    objects = {f"a{i}": {"properties": {"n": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(300)} | {"a300": True}
    doubled: dict[str, Any] = {"type": "null"}
    for i in range(12):
        doubled = {
            "anyOf": [{"minLength": i, **doubled}, {"not": {"maximum": i, "maxLength": i}}],
            "unevaluatedProperties": doubled,
        }
    for source in (deep, wide, long, {"$ref": "#/$defs/a0", "$defs": chain}, {"$ref": "#/$defs/a0", "$defs": objects}, doubled):
        with pytest.raises(RequestRefused):
            schema.grammar(source)


COSTLY: dict[str, dict[str, Any]] = {
    "30 optional properties": {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(30)}},
    "300 optional properties": {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(300)}},
    "990 long values": {"enum": ["a" * 300 + str(i) for i in range(990)]},
    "400 required strings": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "maxLength": 256} for i in range(400)},
        "required": [f"p{i}" for i in range(400)],
    },
}


@pytest.mark.parametrize("name", COSTLY)
async def test_large_schemas_are_within_their_budget(name: str, llama: LlamaEngine) -> None:
    """With a bias that would have sent every token the slow way."""
    (letter,) = llama.tokenize("x")
    sampling = Sampling(temperature=0, logit_bias={letter: 100.0}, grammar=schema.grammar(COSTLY[name]))
    _, finish = await made(llama, max_tokens=24, sampling=sampling, endless=False)
    assert finish.reason in ("stop", "length")


TOOLS_OF_OTHERS: dict[str, dict[str, Any]] = {
    "reference into an array": {
        "tree": {
            "type": "object",
            "properties": {
                "left": {"anyOf": [{"type": "string"}, {"$ref": "#/properties/tree"}]},
                "right": {"$ref": "#/properties/tree/properties/left/anyOf/0"},
            },
        }
    },
    "tuple of draft 7": {
        "p": {"type": "array", "items": [{"type": "number"}] * 2, "additionalItems": False, "minItems": 2, "maxItems": 2}
    },
    "tuple with no other items": {"p": {"type": "array", "prefixItems": [{"type": "number"}], "items": False}},
    "null among the values of a string": {"c": {"type": "string", "enum": ["a", "b", None]}},
    "too many optional properties": {f"p{i}": {"type": "string"} for i in range(900)},
    "a keyword that nobody knows": {"a": {"type": "string", "x-order": 1}},
}


@pytest.mark.parametrize("name", TOOLS_OF_OTHERS)
def test_schemas_of_tools_that_are_in_use(name: str, llama: LlamaEngine) -> None:
    parameters = {"type": "object", "properties": TOOLS_OF_OTHERS[name]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert compiled(llama, chat(tools=tools), AnswerForm(HERMES)) is not None


AGES = {"type": "integer", "minimum": 0, "maximum": 9007199254740991}


@pytest.mark.parametrize(("strict", "refused"), [(True, True), (False, False), (None, False)])
def test_what_cannot_be_enforced_is_left_to_the_model_unless_strict(
    strict: bool | None, refused: bool, llama: LlamaEngine
) -> None:
    """The rest of the schema is enforced all the same."""
    members = {"age": AGES, "code": {"type": "string", "format": "postcode", "maxLength": 8}}
    source = {"type": "object", "properties": members, "required": ["age", "code"], "additionalProperties": False}
    described = {"name": "s", "schema": source} | ({} if strict is None else {"strict": strict})
    request = chat(response_format={"type": "json_schema", "json_schema": described})
    if refused:
        with pytest.raises(RequestRefused, match="'format' at #/properties/code"):
            compiled(llama, request, AnswerForm(HERMES))
        return
    text = request.grammar(AnswerForm(HERMES), schema.Grammars()) or ""
    assert admits(llama, text, '{"age": 9007199254740991, "code": "1000-001"}')
    for wrong in ('{"age": -1, "code": "x"}', '{"age": 1, "code": "123456789"}', '{"age": 1}'):
        assert not admits(llama, text, wrong), wrong


LOOSE: dict[str, tuple[dict[str, Any], str, str]] = {
    "one keyword of several": ({"type": "array", "items": {"type": "integer"}, "minItems": "two"}, "[1]", '["a"]'),
    "a form of a property": (
        {"type": "object", "properties": {"a": {"type": "boolean", "required": True}}}, '{"a": true}', '{"a": 1}'),
    "inside of a choice": ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?<=a)b"}]}, '"x"', "1"),
    "inside of what is not": ({"type": "string", "not": {"format": "postcode"}}, '"x"', "1"),
    "an unknown type": (
        {"type": "object", "properties": {"a": {"type": "date"}, "b": {"type": "null"}}}, '{"a": "x", "b": null}', '{"b": 1}'),
    "a list at the root": ({"type": "array", "minItems": 10**9, "items": {"$ref": "https://x"}}, "[1, {}]", "{}"),
    "any value at the root": ({"$ref": "https://x"}, "[1]", "1 2"),
    "too many ways": ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(900)}}, '{"p1": null}', "[]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOSE)
def test_of_a_schema_that_is_not_strict_one_keyword_is_passed_over(name: str, llama: LlamaEngine) -> None:
    source, right, wrong = LOOSE[name]
    grammars = schema.Grammars()
    text = grammars.text(f"start: {grammars.schema(source, 'response_format', strict=False)}\n")
    assert admits(llama, text, right)
    assert not admits(llama, text, wrong)


def admits(llama: LlamaEngine, grammar: str, text: str) -> bool:
    try:
        return bool(llama.grammar(grammar, tuple(llama.tokenize(text))).matcher.is_accepting())
    except TaskRefused:
        return False


# Letters that every vocabulary spells: what a model cannot write is refused.
letters = st.text(alphabet=st.characters(max_codepoint=0x7F), max_size=6)
names = letters | st.sampled_from(["\x7f", "\u2028", "é", "\\"])
values = st.none() | st.booleans() | st.integers(-99, 99) | letters
schemas = st.recursive(
    st.sampled_from([{}, {"type": "string"}, {"type": "integer"}, {"type": ["number", "null"]}, {"type": "object"}])
    | st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=3))
    | st.builds(lambda v: {"not": {"const": v}}, values)
    | st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 9), st.integers(0, 9)),
    lambda inner: (
        st.builds(
            lambda p, n: {"properties": p, "required": list(p)[:n]},
            st.dictionaries(names, inner, max_size=4),
            st.integers(0, 4),
        )
        | st.builds(lambda i, a, b: {"items": i, "minItems": a, "maxItems": a + b}, inner, st.integers(0, 3), st.integers(0, 3))
        | st.builds(lambda k, o: {k: o}, st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda v: {"type": "object", "additionalProperties": v}, inner)
        | st.builds(lambda v: {"not": v}, inner)
        | st.builds(
            lambda p, n, v: {"patternProperties": {p: v}, "propertyNames": {"minLength": n, "maxLength": n + 1}},
            st.sampled_from(["^a", "b$", "[0-9]"]),
            st.integers(0, 2),
            inner,
        )
    ),
    max_leaves=8,
)


@example(source={"not": {"allOf": [{"type": "string"}, {"minLength": 2}]}})
@given(source=schemas)
@settings(max_examples=60, deadline=None)
def test_every_grammar_is_compiled_or_its_schema_refused(source: dict[str, Any], llama: LlamaEngine) -> None:
    try:
        text = schema.grammar(source)
    except RequestRefused:
        return
    llama.grammar(text)


async def test_a_grammar_without_a_way_on(llama: LlamaEngine) -> None:
    # The whole answer is one letter: after it only the end is left.
    task = make_task(llama, max_tokens=5, sampling=Sampling(temperature=0, grammar='start: "x"'), endless=False)
    tokens, finish = await run(llama, task)
    assert ("".join(token.text for token in tokens), finish.reason) == ("x", "stop")
    # With every way forbidden, nothing is chosen that the grammar refuses.
    (letter,) = llama.tokenize("x")
    never = {letter: -math.inf}
    with pytest.raises(EngineError, match="grammar"):
        await run(llama, dataclasses.replace(task, sampling=dataclasses.replace(task.sampling, logit_bias=never)))
    _, finish = await made(llama, max_tokens=2)
    assert finish.completion_tokens == 2, "the engine goes on"
