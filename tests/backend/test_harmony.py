"""Harmony, the format of GPT-OSS, read wherever its pieces are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.test_call_format import TOOLS, admits
from backend.test_schema import chat
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.harmony import ANALYSIS, END, FINAL, HARMONY_CALLS, NEXT, HarmonyReader
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought
from lacre_backend.api.tools.thoughts import HARMONY, AnswerForm, Start, thought_format
from lacre_backend.engine.generate import LlamaEngine
from parts.bent import cut

unhurried = settings(deadline=None)
words = st.text(alphabet="<|endchal>strom= \nx", max_size=20).filter(
    lambda text: not any(mark in text for mark in ("<|end|>", "<|start|>", "<|channel|>"))
)
places = st.lists(st.integers(0, 400), max_size=12)
sent = st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=2).map(json.dumps)
ENDS = ("", "<|call|>")


def read(pieces: list[str], *, calls: bool = True, speaking: bool = False) -> tuple[str, str, list[tuple[str, str]]]:
    reader = HarmonyReader(["get_tide"] if calls else [], "seed", speaking=speaking)
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    called: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, Called):
            assert part.index == len(called)
            called.append((part.name, ""))
        elif isinstance(part, Argued):
            called[-1] = (called[-1][0], called[-1][1] + part.text)
    assert reader.called == bool(called)
    said = ["".join(part.text for part in parts if isinstance(part, kind)) for kind in (Thought, Speech)]
    return said[0], said[1], called


@unhurried
@given(thought=words, text=words, places=places)
def test_reasoning_and_answer(thought: str, text: str, places: list[int]) -> None:
    assert read(cut(f"{ANALYSIS}{thought}{END}{NEXT}{FINAL}{text}", places)) == (thought, text, [])


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("header", [
    "<|channel|>commentary to=functions.get_tide <|constrain|>json<|message|>",
    " to=functions.get_tide<|channel|>commentary json<|message|>",
    "<|channel|>commentary to=functions.get_tide<|message|>",
])  # fmt: skip
@unhurried
@given(thought=words, preamble=words, arguments=sent, places=places, end=st.sampled_from(ENDS))
def test_calls(header: str, calls: bool, thought: str, preamble: str, arguments: str, places: list[int], end: str) -> None:
    before = f"{ANALYSIS}{thought}{END}{NEXT}<|channel|>commentary<|message|>{preamble}{END}{NEXT}"
    if any(mark in text for mark in ("<|end|>", "<|start|>", "<|channel|>", "<|call|>") for text in (preamble, arguments)):
        return
    got = read(cut(f"{before}{header}{arguments}{end}", places), calls=calls)
    assert got == ((thought, preamble, [("get_tide", arguments)]) if calls else (thought, preamble + arguments, []))


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("Plain words.", "", "Plain words."),
        ("to", "", "to"),
        ("", "", ""),
        (f"{ANALYSIS}so", "so", ""),
        (f"{ANALYSIS}so{END}{NEXT}<|chan", "so", ""),
        (f"{ANALYSIS}so <|en", "so <|en", ""),
        (f"{FINAL}Yes", "", "Yes"),
        (f"{FINAL}a < b <|x|>", "", "a < b <|x|>"),
    ],
)
def test_answers_that_break_off(text: str, thought: str, said: str) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces) == (thought, said, [])


@pytest.mark.parametrize("mark", ["<|start|>", "<|channel|>", "to="])
def test_a_header_without_an_end_is_text(mark: str) -> None:
    long = f"{mark}{'x' * 2000}<|start|>{'y' * 2000}"
    for pieces in ([long], list(long)):
        assert read(pieces) == ("", long, [])


def test_an_answer_that_goes_on_is_text() -> None:
    assert read(["It ", "rains."], speaking=True) == ("", "It rains.", [])


def test_the_format_is_found() -> None:
    assert thought_format(f"x {ANALYSIS} y </think>", f"{FINAL}Two", "Two") is HARMONY
    assert thought_format(f"x {ANALYSIS} y", f"assistant: Two {FINAL}", "Two") is None  # it only mentions the mark
    assert isinstance(AnswerForm(HERMES, HARMONY, Start.FRESH).reader(None, "seed"), HarmonyReader)


CALL = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"


@pytest.mark.parametrize(
    ("choice", "json_text", "good", "bad"),
    [
        ("auto", False, [f"{FINAL}Hello <b>.", CALL, f"{ANALYSIS}so{END}{NEXT}{CALL}", f"{ANALYSIS}so{END}{NEXT}{FINAL}Yes"],
         ["Hello", f"{ANALYSIS}so", CALL.replace("now", "other"), CALL.replace("{}", '{"a": 1}')]),
        ("required", False, [CALL, f"{ANALYSIS}so{END}{NEXT}{CALL}"], [f"{FINAL}Hello", f"{ANALYSIS}so{END}{NEXT}{FINAL}Yes"]),
        (None, True, [f'{FINAL}{{"a": 1}}', f'{ANALYSIS}so{END}{NEXT}{FINAL}{{"a": 1}}'], [f"{FINAL}Hello", '{"a": 1}', CALL]),
    ],
)  # fmt: skip
def test_what_the_grammar_admits(llama: LlamaEngine, choice: Any, json_text: bool, good: list[str], bad: list[str]) -> None:
    offered = {"tools": [tool.model_dump(exclude_none=True) for tool in TOOLS], "tool_choice": choice} if choice else {}
    held = {"response_format": {"type": "json_object"}} if json_text else {}
    source = chat(**offered, **held).grammar(AnswerForm(HARMONY_CALLS, HARMONY, Start.FRESH), Grammars()) or ""
    assert [text for text in good if not admits(llama, source, text)] == []
    assert [text for text in bad if admits(llama, source, text)] == []
