"""Gemma 4's calls: read as JSON wherever the pieces are cut, and held by a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.test_call_format import TOOLS, admits, tool
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.gemma import GEMMA, QUOTE, GemmaReader, as_json
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech
from lacre_backend.api.tools.request import calling
from lacre_backend.engine.generate import LlamaEngine
from parts.bent import cut

unhurried = settings(deadline=None)
texts = st.text(alphabet='}<tool_call|>,:{[]"\\\\ \nx1', max_size=24).filter(lambda text: QUOTE not in text + QUOTE[:-1])
names = st.text(alphabet="abC_1", min_size=1, max_size=4)
values = st.recursive(
    st.one_of(texts, st.integers(), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]], bool]:
    reader = GemmaReader(GEMMA, ["f", "now"], "seed")
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


@unhurried
@given(
    speech=st.text(alphabet="<|tol_ca> \nx", max_size=20).filter(lambda text: "<|tool_call>" not in text),
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "now"]), st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3
    ),
    places=st.lists(st.integers(0, 600), max_size=12),
)
def test_what_is_written_is_read_wherever_it_is_cut(
    speech: str, calls: list[tuple[str, dict[str, Any]]], places: list[int]
) -> None:
    written = "".join(GEMMA.told(*call) for call in calls)
    text, got, called = read(cut(f"{speech}\n{written}", places))
    assert (text, called) == (speech.rstrip(), True)
    assert [(name, json.loads(sent)) for name, sent in got] == calls


@unhurried
@given(text=st.text(alphabet='{}[],:<|">ab1 ', max_size=40))
def test_no_text_raises(text: str) -> None:
    assert isinstance(as_json("{" + text + "}"), str)


def test_arguments_nested_too_deeply_stay_as_they_are() -> None:
    text = "{a:" + "[" * 100_000 + "]" * 100_000 + "}"
    assert as_json(text) == text


def test_a_grammar_holds_the_arguments(llama: LlamaEngine) -> None:
    may_call = calling(TOOLS, "required", many=True)
    assert may_call is not None
    grammars = Grammars()
    source = grammars.text(GEMMA.grammar(grammars, may_call, None))
    tide = GEMMA.told("get_tide", {"port": "Porto, {x}", "unit": "m"})
    good = [tide, GEMMA.told("get_tide", {"port": "", "hours": 3, "unit": "ft"}), GEMMA.told("now", {}), tide + tide]
    bad = [
        GEMMA.told("get_tide", {"port": "a"}),
        GEMMA.told("get_tide", {"port": "a", "unit": "km"}),
        GEMMA.told("get_tide", {"port": "a", "hours": "x", "unit": "m"}),
        GEMMA.told("now", {"a": 1}),
        tide[:-3],
    ]
    assert [text for text in good if not admits(llama, source, text)] == []
    assert [text for text in bad if admits(llama, source, text)] == []


def test_what_cannot_be_enforced_is_refused_if_strict() -> None:
    for strict in (False, True):
        listed = {"type": "object", "properties": {"a": {"type": "array"}}}
        may_call = calling([tool("f", listed, strict=strict)], None, many=True)
        assert may_call is not None
        grammars = Grammars()
        if strict:
            with pytest.raises(RequestRefused, match="texts, numbers"):
                GEMMA.grammar(grammars, may_call, None)
        else:
            assert "gemma_any" in GEMMA.grammar(grammars, may_call, None)
