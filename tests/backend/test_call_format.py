"""Calls of functions as text: what the grammar admits, and how they are read back, wherever the pieces are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import HERMES, LLAMA, Argued, Called, CallFormat, CallReader, Part, Speech
from lacre_backend.api.tools.request import Tool, calling
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import TaskRefused
from parts.bent import cut

unhurried = settings(deadline=None)
TIDE = {
    "type": "object",
    "properties": {"port": {"type": "string"}, "hours": {"type": "integer"}, "unit": {"enum": ["m", "ft"]}},
    "required": ["port", "unit"],
}


def tool(name: str, parameters: dict[str, Any] | None = None, **fields: Any) -> Tool:
    function = {"name": name, **({} if parameters is None else {"parameters": parameters}), **fields}
    return Tool.model_validate({"type": "function", "function": function})


TOOLS = [tool("get_tide", TIDE), tool("now")]


def read(pieces: list[str], form: CallFormat = HERMES) -> tuple[str, list[tuple[str, str]], bool]:
    """The speech, the calls as (name, arguments), and whether the answer ends as one that called."""
    reader = CallReader(form)
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    calls: list[list[str]] = []
    ids = []
    for part in parts:
        if isinstance(part, Called):
            assert part.index == len(calls)
            calls.append([part.name, ""])
            ids.append(part.id)
        elif isinstance(part, Argued):
            assert part.index == len(calls) - 1
            calls[part.index][1] += part.text
    assert len(set(ids)) == len(ids)
    speech = "".join(part.text for part in parts if isinstance(part, Speech))
    return speech, [(name, arguments) for name, arguments in calls], reader.called


arguments = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.one_of(
            st.text(max_size=12), st.integers(), st.none(), st.sampled_from(["}", '"', "\\", "</tool_call>", "{[", "\\\\"])
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)
calls = st.lists(st.tuples(st.sampled_from(["get_tide", "now", "a-b_1"]), arguments.map(json.dumps)), min_size=1, max_size=3)


@unhurried
@given(
    speech=st.text(max_size=20).filter(lambda text: "<tool_call>" not in text),
    calls=calls,
    places=st.lists(st.integers(0, 500), max_size=12),
)
def test_what_is_written_is_read_wherever_it_is_cut(speech: str, calls: list[tuple[str, str]], places: list[int]) -> None:
    text = speech + "\n" + HERMES.between.join(HERMES.written(*call) for call in calls)
    assert read(cut(text, places)) == (speech.rstrip(), calls, True)


@unhurried
@given(text=st.text(alphabet="<tool_cal>/ \nx", max_size=40), places=st.lists(st.integers(0, 50), max_size=12))
def test_text_without_a_call_is_text(text: str, places: list[int]) -> None:
    if "<tool_call>" not in text:
        assert read(cut(text, places)) == (text, [], False)


@unhurried
@given(call=calls.map(lambda made: made[0]), places=st.lists(st.integers(0, 200), max_size=9))
def test_a_format_whose_first_character_decides(call: tuple[str, str], places: list[int]) -> None:
    assert read(cut(LLAMA.written(*call), places), LLAMA) == ("", [call], True)
    assert read(cut("It rises {soon}.", places), LLAMA) == ("It rises {soon}.", [], False)


@pytest.mark.parametrize(
    ("text", "speech", "made", "called"),
    [
        ('<tool_call>\n{"name": "no', "", [], False),
        ('<tool_call>\n{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')], False),
        ('<tool_call>\n{"name": "now", "arguments": {}', "", [("now", "{}")], True),
        (HERMES.written("now", "{}") + "\n<tool_c", "", [("now", "{}")], True),
        ("Wait <tool", "Wait <tool", [], False),
        ("Wait  \n", "Wait  \n", [], False),
        ("<tool_call>Sorry", "<tool_call>Sorry", [], False),
    ],
)
def test_answers_that_break_off(text: str, speech: str, made: list[tuple[str, str]], called: bool) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces) == (speech, made, called)


# The grammar, by its masks


def grammar(choice: Any = None, *, tools: list[Tool] = TOOLS, many: bool = True, json_text: bool = False,
            form: CallFormat = HERMES) -> str:  # fmt: skip
    may_call = calling(tools, choice, many=many)
    assert may_call is not None
    grammars = Grammars()
    return grammars.text(form.grammar(grammars, may_call, grammars.any_object() if json_text else None))


def admits(llama: LlamaEngine, source: str, text: str) -> bool:
    """Whether the grammar admits the text, and an end after it."""
    try:
        allowed = llama._masks.compile(source, llama.tokenize(text)).allowed
    except TaskRefused as refusal:
        assert refusal.field == "begun"
        return False
    return all(allowed[token] for token in range(llama.model.n_vocab) if llama._model.ends(token))


TIDE_CALL = HERMES.written("get_tide", '{"port": "Porto", "unit": "m"}')
NOW_CALL = HERMES.written("now", "{}")
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("choice", "several"),
    [
        (NOW, False),
        ("required", True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}, True),
    ],
    ids=["by name", "required", "allowed"],
)
def test_a_function_by_name_is_called_once(choice: Any, several: bool, llama: LlamaEngine) -> None:
    source = grammar(choice)
    assert admits(llama, source, NOW_CALL)
    assert admits(llama, source, f"{NOW_CALL}\n{NOW_CALL}") == several


SPOKEN = ["", "Hello <b>you</b>.", "x < y", "a <tool_cal", "<<tool_cal l>", "é\n東京", "tool_call>"]
BAD = [
    HERMES.written("get_tide", "{}"),
    HERMES.written("get_tide", '{"port": "Porto", "unit": "km"}'),
    HERMES.written("get_tide", '{"port": 1, "unit": "m"}'),
    HERMES.written("now", '{"a": 1}'),
    HERMES.written("other", "{}"),
    "<tool_call>Sorry",
    TIDE_CALL + " and more",
    TIDE_CALL[:-3],
]


def test_auto_admits_text_or_calls(llama: LlamaEngine) -> None:
    source = grammar()
    for text in (*SPOKEN, TIDE_CALL, f"Let me see.\n{NOW_CALL}", f"{TIDE_CALL}\n{NOW_CALL}"):
        assert admits(llama, source, text), text
    for text in (*BAD, f"Hm {BAD[0]}"):
        assert not admits(llama, source, text), text


def test_required_admits_calls_alone(llama: LlamaEngine) -> None:
    source = grammar("required")
    for text in (TIDE_CALL, NOW_CALL, f"{NOW_CALL}\n{NOW_CALL}"):
        assert admits(llama, source, text), text
    for text in (*SPOKEN, *BAD, f"Hm {TIDE_CALL}"):
        assert not admits(llama, source, text), text


def test_one_call_where_several_are_not_wanted(llama: LlamaEngine) -> None:
    for choice in (None, "required"):
        source = grammar(choice, many=False)
        assert admits(llama, source, NOW_CALL)
        assert not admits(llama, source, f"{NOW_CALL}\n{NOW_CALL}")


NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (NOW, True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}, True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NOW]}}, False),
    ],
)
def test_a_named_function(llama: LlamaEngine, choice: Any, named: bool) -> None:
    source = grammar(choice)
    assert admits(llama, source, NOW_CALL)
    assert not admits(llama, source, TIDE_CALL)
    assert admits(llama, source, "Hello.") is not named


def test_json_or_a_call(llama: LlamaEngine) -> None:
    source = grammar(json_text=True)
    assert admits(llama, source, '{"a": 1}')
    assert admits(llama, source, NOW_CALL)
    assert not admits(llama, source, "Hello.")


def test_a_format_without_a_marker_does_not_go_with_json() -> None:
    with pytest.raises(RequestRefused) as caught:
        grammar(json_text=True, form=LLAMA)
    assert caught.value.param == "response_format"
    assert grammar("required", json_text=True, form=LLAMA)


def test_another_format(llama: LlamaEngine) -> None:
    source = grammar(form=LLAMA)
    for text in ("", "It rises.", LLAMA.written("get_tide", '{"port": "Porto", "unit": "m"}')):
        assert admits(llama, source, text), text
    for text in ("{oh", LLAMA.written("get_tide", "{}"), LLAMA.written("now", "{}") * 2):
        assert not admits(llama, source, text), text


# Schemas of functions


LOOSE: dict[str, Any] = {
    "type": "object",
    "title": "Args",
    "properties": {
        "url": {"type": "string", "format": "uri", "pattern": "^https:"},
        "n": {"type": "integer", "minimum": 1, "maximum": 9},
        "many": {"type": "array", "items": {"oneOf": [{"type": "string"}, {"type": "null"}]}, "uniqueItems": True},
        "when": {"allOf": [{"type": "string"}]},
        "long": {"type": "string", "maxLength": 100_000},
        "node": {"$ref": "#/$defs/Node"},
    },
    "required": ["url", "undeclared"],
    "$defs": {"Node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}},
    "minProperties": 1,
}


def test_what_cannot_be_enforced_is_refused_where_strict_and_left_to_the_model_where_not(llama: LlamaEngine) -> None:
    source = grammar("required", tools=[tool("f", LOOSE)])
    for sent in (
        '{"url": "https://x", "undeclared": 1}',
        '{"url": "https://x", "n": 9, "many": ["a", null], "when": "", "long": "y", "node": {"next": null}, "undeclared": []}',
    ):
        assert admits(llama, source, HERMES.written("f", sent)), sent
    for sent in ("{}", '{"url": 1}', '{"url": "https:x", "undeclared": 1, "n": "1"}', '{"url": "https:x", "many": [1]}'):
        assert not admits(llama, source, HERMES.written("f", sent)), sent
    with pytest.raises(RequestRefused) as caught:
        grammar("required", tools=[tool("g"), tool("f", LOOSE, strict=True)])
    assert caught.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize("parameters", [{"type": "string"}, {"type": ["string", "null"]}, {"type": 1}])
def test_arguments_are_an_object(parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused, match="object"):
        grammar(tools=[tool("f", parameters)])


@unhurried
@given(
    parameters=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from(["string", "object", "array", "#", "uri"])),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "items", "enum", "const", "anyOf", "oneOf", "$ref", "required", "format",
                             "minLength", "maxItems", "additionalProperties", "pattern", "a"]),
            inner, max_size=4,
        ),
        max_leaves=12,
    ).filter(lambda made: isinstance(made, dict))
)  # fmt: skip
@example(parameters={"required": [[]]})
def test_no_schema_raises_anything_but_a_refusal(parameters: dict[str, Any]) -> None:
    for strict in (False, True):
        try:
            assert "start: " in grammar(tools=[tool("f", parameters, strict=strict)])
        except RequestRefused as refusal:
            assert refusal.param == "tools[0].function.parameters"
