"""Reasoning in a model's text, read apart wherever the pieces are cut, and what a grammar admits behind it."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.conftest import load_llama
from backend.test_call_format import NOW_CALL, TIDE_CALL, TOOLS, admits
from backend.test_schema import chat
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.thoughts import THOUGHTS, AnswerForm, AnswerReader, Start, ThoughtFormat, thought_format
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Task, TaskRefused, check
from parts.bent import cut

unhurried = settings(deadline=None)
THINK = THOUGHTS[0]
FORMATS = pytest.mark.parametrize("form", THOUGHTS, ids=lambda form: form.close.strip("</|>[]"))
places = st.lists(st.integers(0, 300), max_size=12)
words = st.text(alphabet="<think/>|[]HK chanel \nx", max_size=24)


def read(
    pieces: list[str], form: ThoughtFormat | None = THINK, *, calls: bool = False, start: Start = Start.FRESH
) -> tuple[str, str, str]:
    """The reasoning, the text, and the calls as JSON."""
    reader = AnswerReader(form, CallReader(HERMES, ["now", "other"], "seed") if calls else None, start)
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    assert all(part.text for part in parts if not isinstance(part, Called))
    said = ["".join(part.text for part in parts if isinstance(part, kind)) for kind in (Thought, Speech)]
    called = "".join(
        part.name if isinstance(part, Called) else part.text for part in parts if isinstance(part, Called | Argued)
    )
    assert [part for part in parts if isinstance(part, Thought)] == parts[: sum(isinstance(part, Thought) for part in parts)]
    return said[0], said[1], called


@FORMATS
@unhurried
@given(thought=words, text=words, places=places, opened=st.booleans())
def test_reasoning_is_read_apart_wherever_it_is_cut(
    form: ThoughtFormat, thought: str, text: str, places: list[int], opened: bool
) -> None:
    if form.close in thought + form.close[:-1]:
        return
    written = f"{'' if opened else form.open}{thought}\n{form.close}\n\n{text}"
    start = Start.THINKING if opened else Start.FRESH
    end = f"{thought}\n{form.close}".index(form.close)  # the thought may end with the mark's beginning
    assert read(cut(written, places), form, start=start) == (thought[:end].strip(), text.lstrip(), "")


@unhurried
@given(thought=words, arguments=st.dictionaries(st.text(max_size=4), st.text(max_size=6), max_size=2), places=places)
def test_calls_come_behind_the_reasoning_and_none_from_inside(
    thought: str, arguments: dict[str, str], places: list[int]
) -> None:
    if "</think>" in thought:
        return
    sent = json.dumps(arguments)
    inside = HERMES.written("other", "{}")
    written = f"<think>{thought}{inside}</think>\nSo:\n{HERMES.written('now', sent)}"
    got = read(cut(written, places), calls=True)
    assert got == ((thought + inside).strip(), "So:", "now" + sent)
    assert read(cut(written, places)) == (got[0], f"So:\n{HERMES.written('now', sent)}", "")


@unhurried
@given(text=st.text(alphabet="<think>/ \nx", max_size=30), places=places)
def test_a_model_that_does_not_reason_says_what_it_says(text: str, places: list[int]) -> None:
    assert read(cut(text, places), None) == ("", text, "")
    assert read(cut("A" + text, places)) == ("", "A" + text, "")
    assert read(cut(text, places), start=Start.SPEAKING) == ("", text, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\n\n</think>\n\nYes", ("", "Yes", "")),
        ("<think>so", ("so", "", "")),
        ("<think>so </thi", ("so </thi", "", "")),
        ("<think>a</think>", ("a", "", "")),
        ("  \n<think>a</think>b <think>c</think>", ("a", "b <think>c</think>", "")),
        ("<thin", ("", "<thin", "")),
        (" \n", ("", " \n", "")),
        ("", ("", "", "")),
    ],
)
def test_answers_that_break_off(text: str, expected: tuple[str, str, str]) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces) == expected


@pytest.mark.parametrize(
    ("rendered", "begun", "start"),
    [
        ("<|start|>assistant\n", "", Start.FRESH),
        ("<|start|>assistant\n<think>\n", "", Start.THINKING),
        ("<|start|>assistant\n<think>\n\n</think>\n\n", "", Start.FRESH),
        ("Say <think>!<|end|><|start|>assistant\n", "", Start.FRESH),
        ("assistant\n", "<think>I am", Start.THINKING),
        ("assistant\n", "<think>I am</think> so", Start.SPEAKING),
        ("assistant\n", "It is", Start.SPEAKING),
        ("assistant\n<think>", "I am", Start.THINKING),
        ("assistant\n<think>", "I am</think>", Start.SPEAKING),
    ],
)
def test_where_an_answer_begins(rendered: str, begun: str, start: Start) -> None:
    assert THINK.start(rendered, begun) is start


def test_the_format_is_found_by_the_mark_that_ends_the_reasoning() -> None:
    assert [thought_format(f"x {form.close} y", "", "Two") for form in THOUGHTS] == list(THOUGHTS)
    assert [thought_format("", f"x {form.close} y", "Two") for form in THOUGHTS] == list(THOUGHTS)
    assert thought_format("{{ messages }}", "user: Hello", "Two") is None


# What the grammar admits

OBJECT = '{"a": 1}'
JSON_FORM = [
    (
        Start.FRESH,
        [OBJECT, f"<think>so</think>\n{OBJECT}", f"\n<think>\n{{</think>{OBJECT}"],
        ["so", f"so</think>{OBJECT}", "<think>so"],
    ),
    (Start.THINKING, [f"so</think>\n\n{OBJECT}", f"</think>{OBJECT}"], [OBJECT, "so</think>", f"so</think>\nNo {OBJECT}"]),
    (Start.SPEAKING, [OBJECT], [f"<think>so</think>{OBJECT}"]),
]


@pytest.mark.parametrize(("start", "admitted", "others"), JSON_FORM, ids=[str(case[0].name) for case in JSON_FORM])
def test_the_answer_is_held_behind_the_reasoning(
    llama: LlamaEngine, start: Start, admitted: list[str], others: list[str]
) -> None:
    source = chat(response_format={"type": "json_object"}).grammar(AnswerForm(HERMES, THINK, start), Grammars()) or ""
    assert [text for text in admitted if not admits(llama, source, text)] == []
    assert [text for text in others if admits(llama, source, text)] == []


def test_calls_are_held_behind_the_reasoning(llama: LlamaEngine) -> None:
    tools = [tool.model_dump(exclude_none=True) for tool in TOOLS]
    form = AnswerForm(HERMES, THINK, Start.THINKING)
    for choice, admitted, others in (
        (
            "auto",
            [f"so</think>\n\n{NOW_CALL}", "so</think>Yes.", f"<tool_call></think>Hm\n{TIDE_CALL}"],
            ["a</think><tool_call>b"],
        ),
        ("required", [f"so</think>\n\n{NOW_CALL}"], ["so</think>Yes.", "so"]),
    ):
        source = chat(tools=tools, tool_choice=choice).grammar(form, Grammars()) or ""
        assert [text for text in admitted if not admits(llama, source, text)] == []
        assert [text for text in others if admits(llama, source, text)] == []


# The engine


def test_a_mark_that_is_a_control_token_is_text() -> None:
    with closing(load_llama()) as engine:
        mark = next(token.id for token in engine.model.control_tokens if token.text == "<|im_start|>")
        end = next(token.id for token in engine.model.control_tokens if engine._model.ends(token.id))
        assert engine.released([mark]) == [""]
        with pytest.raises(TaskRefused):
            check(Task("a", prompt=(1,), max_tokens=1, begun=(mark,)), engine.model)
        engine.speak([mark, end])
        assert engine.released([mark, end]) == ["<|im_start|>", ""]
        check(Task("a", prompt=(1,), max_tokens=1, begun=(mark,)), engine.model)
        with pytest.raises(TaskRefused):
            check(Task("a", prompt=(1,), max_tokens=1, begun=(end,)), engine.model)
        assert engine.grammar('start: "<|im_start|>" /[a-z]+/', (mark,)).begun == (mark,)
