"""Calls as Python writes them, and those of Functionary 3.2: what test_every_format does not write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backend.test_call_format import tool
from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.parts import Argued, Called, Speech
from lacre_backend.api.tools.pythonic import PYTHONIC, as_json
from lacre_backend.api.tools.recipients import FUNCTIONARY_3_2
from lacre_backend.api.tools.request import calling
from lacre_backend.api.tools.tagged import QWEN_CODER
from lacre_backend.api.tools.thoughts import AnswerForm, Start


def read(text: str, form: CallFormat, *, start: Start = Start.FRESH) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the calls: the same whole and letter by letter."""
    outcomes = []
    for pieces in ([text], list(text)):
        reader = AnswerForm(form, None, start).reader(calling([tool("get"), tool("now")], None, many=True), "seed")
        assert reader is not None
        parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
        calls: list[list[str]] = []
        for part in parts:
            if isinstance(part, Called):
                calls.append([part.name, ""])
            elif isinstance(part, Argued):
                calls[-1][1] += part.text
        outcomes.append(("".join(part.text for part in parts if isinstance(part, Speech)), [(a, b) for a, b in calls]))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("a=(1, 2), b=[(3, [4])]", {"a": [1, 2], "b": [[3, [4]]]}),
        ("a='it\\'s', b=\"x)\", c=Porto", {"a": "it's", "b": "x)", "c": "Porto"}),
        (r"a='\x41\u00e9\n\q'", {"a": "Aé\n\\q"}),
        ("a=True, b=false, c=None, d=-1.5e3", {"a": True, "b": False, "c": None, "d": -1500.0}),
        (" a = {'b': {'c d': []}} , ", {"a": {"b": {"c d": []}}}),
        ("", {}),
    ],
)
def test_arguments_are_json(written: str, value: Any) -> None:
    text, calls = read(f"[get({written}), now()]", PYTHONIC)
    assert (text, [name for name, _ in calls]) == ("", ["get", "now"])
    assert json.loads(calls[0][1]) == value


@pytest.mark.parametrize(
    "written", ["1, 2", "a=[1", "a={1: 2}", "**a", "a=1e999", r"a='\ud800'", r"a='\U00ffffff'", "a=" + "[" * 9999]
)
def test_what_is_no_python_stays_as_it_is(written: str) -> None:
    assert as_json(written) == written


@pytest.mark.parametrize("text", ["[1] is a note.", "[get", "[getting(x)]", "[ok]", "[get, now]"])
def test_a_text_in_brackets_is_text(text: str) -> None:
    assert read(text, PYTHONIC) == ("" if text == "[get" else text, [])


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("all\nHello.", "Hello.", []),
        ("all\n>>> x\nHello.", ">>> x\nHello.", []),
        ("getting there", "getting there", []),
        ("Hello.", "Hello.", []),
        ("get\n{}>>>now\n{}", "", [("get", "{}"), ("now", "{}")]),
        ("all\nSo:>>>get\n{}", "So:", [("get", "{}")]),
        ("al", "", []),
    ],
)
def test_recipients(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert read(text, FUNCTIONARY_3_2) == (said, calls)


def test_an_answer_that_goes_on_is_text() -> None:
    assert read("all\nHello.", FUNCTIONARY_3_2, start=Start.SPEAKING) == ("all\nHello.", [])
    assert read("[get()]", PYTHONIC, start=Start.SPEAKING) == ("[get()]", [])


def test_words_in_place_of_an_argument_end_the_call() -> None:
    assert read("<tool_call>\n<function=get>\nSorry.", QWEN_CODER) == ("Sorry.", [("get", "{}")])
