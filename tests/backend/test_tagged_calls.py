"""Calls whose arguments stand between tags: read as JSON wherever the pieces are cut, and held by a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.test_call_format import TOOLS, admits, tool
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech
from lacre_backend.api.tools.request import calling
from lacre_backend.api.tools.tagged import QWEN_CODER, TAGGED, TaggedFormat, TaggedReader, texts_of
from lacre_backend.engine.generate import LlamaEngine
from parts.bent import cut

unhurried = settings(deadline=None)
EACH = pytest.mark.parametrize("form", TAGGED, ids=lambda form: f"{form.begin}{form.open}{form.middle}{form.key_close}"[:32])
PROPERTIES = {"text": {"type": "string"}, "code": {"type": "string"}, "n": {"type": "integer"}, "any": {}}
OFFERED = calling([tool("write", {"type": "object", "properties": PROPERTIES}), tool("now")], None, many=True)
# A text may hold anything but what ends it.
texts = st.text(alphabet='<parmet/>_vlug=123{}"\\\\ \nx\u4e16', max_size=24).filter(
    lambda text: not any(form.value_close.strip() in text for form in TAGGED)
)
arguments = st.fixed_dictionaries(
    {}, optional={"text": texts, "code": texts, "n": st.integers(), "any": st.lists(st.booleans() | st.none(), max_size=2)}
)


def read(pieces: list[str], form: TaggedFormat) -> tuple[str, list[tuple[str, str]], bool]:
    assert OFFERED is not None
    reader = TaggedReader(form, "seed", texts_of(OFFERED))
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, Called):
            calls.append((part.name, ""))
        elif isinstance(part, Argued):
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return "".join(part.text for part in parts if isinstance(part, Speech)), calls, reader.called


@EACH
@unhurried
@given(
    speech=st.text(alphabet="<tol_ca>seed: \nx", max_size=20),
    calls=st.lists(st.tuples(st.sampled_from(["write", "now"]), arguments), min_size=1, max_size=3),
    places=st.lists(st.integers(0, 600), max_size=12),
)
def test_what_is_written_is_read_wherever_it_is_cut(
    form: TaggedFormat, speech: str, calls: list[tuple[str, dict[str, Any]]], places: list[int]
) -> None:
    if form.marker is None or form.marker in speech:
        return
    calls = [(name, sent if name == "write" else {}) for name, sent in calls]
    written = form.begin + form.between.join(form.told(*call) for call in calls) + form.end
    text, got, called = read(cut(f"{speech}\n{written}", places), form)
    assert (text, called) == (speech.rstrip(), True)
    assert [(name, json.loads(sent)) for name, sent in got] == calls


def test_a_call_that_breaks_off_holds_what_was_whole() -> None:
    written = QWEN_CODER.told("write", {"text": "a", "n": 1})
    _, calls, called = read([written[: written.index("1") + 1]], QWEN_CODER)
    assert calls == [("write", '{"text": "a"')] and not called


@EACH
def test_a_grammar_holds_the_arguments(form: TaggedFormat, llama: LlamaEngine) -> None:
    may_call = calling(TOOLS, "required", many=True)
    assert may_call is not None
    grammars = Grammars()
    source = grammars.text(form.grammar(grammars, may_call, None))
    tide = form.told("get_tide", {"port": "Po\nrto", "unit": "m"})
    good = [
        tide,
        form.told("get_tide", {"port": "", "hours": 3, "unit": "ft"}),
        form.told("now", {}),
        f"{tide}{form.between}{tide}",
    ]
    bad = [
        form.told("get_tide", {"port": "a"}),
        form.told("get_tide", {"port": "a", "unit": "km"}),
        form.told("get_tide", {"port": "a", "hours": "x", "unit": "m"}),
        form.told("now", {"a": 1}),
        form.told("other", {}),
        tide[:-3],
        "Hello",
    ]
    assert [text for text in good if not admits(llama, source, form.begin + text + form.end)] == []
    assert [text for text in bad if admits(llama, source, form.begin + text + form.end)] == []


def test_a_limit_of_a_text_that_cannot_be_enforced_is_refused_if_strict() -> None:
    for strict in (False, True):
        limited = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x"}}, "required": ["a"]}
        may_call = calling([tool("f", limited, strict=strict)], None, many=True)
        assert may_call is not None
        grammars = Grammars()
        if strict:
            with pytest.raises(RequestRefused, match="pattern"):
                QWEN_CODER.grammar(grammars, may_call, None)
        else:
            assert "plain_value" in QWEN_CODER.grammar(grammars, may_call, None)
