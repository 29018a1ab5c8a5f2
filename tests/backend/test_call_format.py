"""Calls of functions as text: what the grammar admits, and how they are read back, wherever the pieces are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import FORMATS, HERMES, LLAMA, CallFormat
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech
from lacre_backend.api.tools.reader import CallReader
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
NAMES = ["get_tide", "now", "a-b_1"]


def read(pieces: list[str], form: CallFormat = HERMES) -> tuple[str, list[tuple[str, str]], bool]:
    """The speech, the calls as (name, arguments), and whether the answer ends as one that called."""
    reader = CallReader(form, NAMES, "seed")
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
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments.map(json.dumps)), min_size=1, max_size=3)


@unhurried
@given(
    speech=st.text(max_size=20).filter(lambda text: "<tool_call>" not in text),
    calls=calls,
    places=st.lists(st.integers(0, 500), max_size=12),
)
def test_what_is_written_is_read_wherever_it_is_cut(speech: str, calls: list[tuple[str, str]], places: list[int]) -> None:
    text = speech + "\n" + HERMES.between.join(HERMES.written(*call) for call in calls)
    assert read(cut(text, places)) == (speech.rstrip(), calls, True)


def all_written(form: CallFormat, calls: list[tuple[str, str]]) -> str:
    """Calls as the model writes them: names and arguments."""
    return form.begin + form.between.join(form.written(*call) for call in calls) + form.end


MARKED = [form for form in FORMATS if form.marker and not form.lead and not form.once]  # test_every_format has all of them


@pytest.mark.parametrize("form", MARKED, ids=lambda form: f"{form.begin}{form.open}"[:24])
@unhurried
@given(
    speech=st.text(alphabet="<tol_ca>[|TOS]{} \nx", max_size=20),
    calls=calls,
    places=st.lists(st.integers(0, 500), max_size=12),
    ids=st.booleans(),
)
def test_each_format_is_read_wherever_it_is_cut(
    form: CallFormat, speech: str, calls: list[tuple[str, str]], places: list[int], ids: bool
) -> None:
    if form.marker is None or form.marker in speech:
        return
    written = all_written(form, calls)
    if ids and form.tail:
        written = form.begin + form.between.join(
            form.open + name + form.middle + sent + ', "id": "a1B2c3D4e"}' for name, sent in calls
        )
    tag = {":[0-9]{1,3}": ":0", r"\[CALL_ID\][a-zA-Z0-9]{9}": "[CALL_ID]a1B2c3D4e"}.get(form.tag, "") if ids else ""
    for name, _ in calls if tag else ():
        written = written.replace(form.open + name + form.middle, form.open + name + tag + form.middle)
    assert read(cut(f"{speech}\n{written}", places), form) == (speech.rstrip(), calls, True)


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
TWICE = f"{NOW_CALL}\n{NOW_CALL}"
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
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


def allowed(mode: str) -> Any:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NOW]}}


# What is asked for, what the grammar admits then, and what it does not.
GRAMMARS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "auto": ({}, [*SPOKEN, TIDE_CALL, f"Let me see.\n{NOW_CALL}", f"{TIDE_CALL}\n{NOW_CALL}"], [*BAD, f"Hm {BAD[0]}"]),
    "auto, one call": ({"many": False}, [NOW_CALL], [TWICE]),
    "required": ({"choice": "required"}, [TIDE_CALL, NOW_CALL, TWICE], [*SPOKEN, *BAD, f"Hm {TIDE_CALL}"]),
    "required, one call": ({"choice": "required", "many": False}, [NOW_CALL], [TWICE]),
    "a function by name is called once": ({"choice": NOW}, [NOW_CALL], [TWICE, TIDE_CALL, "Hello."]),
    "allowed and required": ({"choice": allowed("required")}, [NOW_CALL, TWICE], [TIDE_CALL, "Hello."]),
    "allowed": ({"choice": allowed("auto")}, [NOW_CALL, "Hello."], [TIDE_CALL]),
    "JSON or a call": ({"json_text": True}, ['{"a": 1}', NOW_CALL], ["Hello."]),
    "another format": (
        {"form": LLAMA}, ["", "It rises.", LLAMA.written("get_tide", '{"port": "Porto", "unit": "m"}')],
        ["{oh", LLAMA.written("get_tide", "{}"), LLAMA.written("now", "{}") * 2],
    ),
    "what cannot be enforced is left to the model": (
        {"choice": "required", "tools": [tool("f", LOOSE)]},
        [HERMES.written("f", sent) for sent in (
            '{"url": "https://x", "undeclared": 1}',
            '{"url": "https://x", "n": 9, "many": ["a", null], "when": "", "long": "y", "node": {"next": null}, '
            '"undeclared": []}',
        )],
        [HERMES.written("f", sent) for sent in (
            "{}", '{"url": 1}', '{"url": "https:x", "undeclared": 1, "n": "1"}', '{"url": "https:x", "many": [1]}')],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAMMARS)
def test_what_a_grammar_admits(name: str, llama: LlamaEngine) -> None:
    asked, admitted, others = GRAMMARS[name]
    source = grammar(**asked)
    assert [text for text in admitted if not admits(llama, source, text)] == []
    assert [text for text in others if admits(llama, source, text)] == []


@pytest.mark.parametrize("form", MARKED, ids=lambda form: f"{form.begin}{form.open}"[:24])
def test_what_the_grammar_of_each_format_admits(form: CallFormat, llama: LlamaEngine) -> None:
    tide, now = ("get_tide", '{"port": "Porto", "unit": "m"}'), ("now", "{}")
    for choice, text in (("auto", "Hm\n"), ("auto", ""), ("required", "")):
        source = grammar(choice, form=form)
        for made in ([now], [tide], [tide, now, now]):
            assert admits(llama, source, text + all_written(form, made)), (choice, text, made)
        for made in ([("other", "{}")], [("get_tide", "{}")]):
            assert not admits(llama, source, text + all_written(form, made)), (choice, text, made)
    assert not admits(llama, grammar("required", form=form, many=False), all_written(form, [now, now]))
    assert admits(llama, grammar("auto", form=form), "Hello.") and not admits(llama, grammar("required", form=form), "Hello.")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"json_text": True, "form": LLAMA}, "response_format"),  # a format without a marker
        ({"choice": "required", "tools": [tool("g"), tool("f", LOOSE, strict=True)]}, "tools[1].function.parameters"),
        ({"tools": [tool("f", {"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", {"type": ["string", "null"]})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", {"type": 1})]}, "tools[0].function.parameters"),
    ],
)
def test_what_has_no_grammar(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRefused, check=lambda refused: refused.param == param):
        grammar(**asked)
    assert grammar("required", json_text=True, form=LLAMA)


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
