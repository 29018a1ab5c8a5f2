"""Each format of calls and of reasoning, by the same rules: what a model writes in it is read as it was meant, wherever the
tokens are cut; nothing else is a call; and the grammar holds what is offered.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.test_call_format import admits, tool
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.gemma import QUOTE, GemmaCalls
from lacre_backend.api.tools.harmony import ANALYSIS, END, FINAL, HARMONY_CALLS, NEXT
from lacre_backend.api.tools.known import KNOWN_CALLS
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought
from lacre_backend.api.tools.recipients import FUNCTIONARY_3_2
from lacre_backend.api.tools.request import Calling, calling
from lacre_backend.api.tools.tagged import TaggedFormat
from lacre_backend.api.tools.thoughts import HARMONY, THOUGHTS, AnswerForm, Start, ThoughtFormat
from lacre_backend.engine.generate import LlamaEngine
from parts.bent import cut
from parts.written_calls import Call, alone, once, written

unhurried = settings(deadline=None, max_examples=30)
# Names that begin each other
OFFERED: Final = ("get", "get_tide", "get_tide-2", "all_of")
PROPERTIES: Final = {"port": {"type": "string"}, "n": {"type": "integer"}, "on": {"type": "boolean"}, "deep": {}}
TOOLS: Final = [tool(name, {"type": "object", "properties": PROPERTIES}) for name in OFFERED]


def named(form: CallFormat) -> str:
    return ascii(f"{form.begin}{form.open}{form.middle}")[1:40]


EACH = pytest.mark.parametrize("form", KNOWN_CALLS, ids=named)
Read = tuple[str, str, list[Call]]


def offered(*, many: bool = True, choice: Any = None) -> Calling:
    found = calling(TOOLS, choice, many=many)
    assert found is not None
    return found


def answer(form: CallFormat, thoughts: ThoughtFormat | None, thought: str, text: str, calls: Sequence[Call]) -> str:
    """A whole answer as the model writes it."""
    made = written(form, calls) if calls else ""
    if form is HARMONY_CALLS:
        said = f"<|channel|>commentary<|message|>{text}{END}{NEXT}" if calls else f"{FINAL}{text}"
        return f"{ANALYSIS}{thought}{END}{NEXT}{said}{made}"
    before = "" if thoughts is None else f"{thoughts.open}{thought}{thoughts.close}\n\n"
    if form is FUNCTIONARY_3_2:
        return before + (form.answer + text + made if text or not calls else made.removeprefix(">>>"))
    return before + text + ("\n" if text and calls else "") + made


def read(pieces: Sequence[str], form: CallFormat, thoughts: ThoughtFormat | None, offers: Calling | None = None) -> Read:
    reader = AnswerForm(form, HARMONY if form is HARMONY_CALLS else thoughts, Start.FRESH).reader(offers or offered(), "seed")
    assert reader is not None
    parts: list[Part] = [part for piece in pieces for part in reader.push(piece)]
    parts += reader.finish()
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, Called):
            assert part.index == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, Argued):
            assert part.index == len(calls) - 1
            calls[-1][1] += part.text
    said = ["".join(part.text for part in parts if isinstance(part, kind)) for kind in (Thought, Speech)]
    return said[0], said[1], [(name, as_json(sent)) for name, sent in calls]


def as_json(sent: str) -> Any:
    try:
        return json.loads(sent)
    except ValueError:
        return sent  # broken off


# A text may hold anything but the marks that its own format reads there.
hard: Final = (
    "}",
    '"',
    "\\",
    "</tool_call>",
    "{[",
    "\\\\",
    "]",
    ")",
    "',",
    "(x=1)",
    "\n",
    "é 世 🌊",
    ", ",
    "</",
    "<|",
    ">>>",
    "get(",
)
texts = st.text(alphabet=st.sampled_from("ab \"\\{}[]()<>|/=,:'\né世🌊"), max_size=16) | st.sampled_from(hard)
values = st.recursive(
    st.one_of(texts, st.integers(-5, 10**18), st.booleans(), st.none(), st.floats(-10, 10).map(lambda x: round(x, 3))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b_1", "c d"]), inner, max_size=3),
    max_leaves=5,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "port": texts,
        "n": st.integers(-9, 9),
        "on": st.booleans(),
        "deep": values.filter(lambda x: not isinstance(x, str)),
    },
)
calls_made = st.lists(st.tuples(st.sampled_from(OFFERED), arguments), max_size=3)
spoken = st.text(alphabet=st.sampled_from("ab.,!? é世\n"), max_size=12).map(str.strip)
places = st.lists(st.integers(0, 700), max_size=16)
thoughts_of = st.sampled_from([None, *THOUGHTS])


def told_apart(form: CallFormat, thoughts: ThoughtFormat | None, arguments: Mapping[str, Any]) -> bool:
    """Whether these arguments can stand in this format: outside of JSON, a text cannot hold what ends it."""

    def inside(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [*value, *itertools.chain.from_iterable(map(inside, value.values()))]
        return (
            [value]
            if isinstance(value, str)
            else [*itertools.chain.from_iterable(map(inside, value))]
            if isinstance(value, list)
            else []
        )

    said = inside(dict(arguments))
    if isinstance(form, TaggedFormat):
        return not any(form.value_close.strip() in text + form.value_close.strip()[:-1] or text.endswith("<") for text in said)
    return not isinstance(form, GemmaCalls) or not any(QUOTE in text + QUOTE[:-1] or '"' in text for text in said)


@EACH
@unhurried
@given(thoughts=thoughts_of, thought=spoken, text=spoken, calls=calls_made, places=places)
def test_an_answer_is_read_as_it_was_meant_wherever_it_is_cut(
    form: CallFormat, thoughts: ThoughtFormat | None, thought: str, text: str, calls: list[Call], places: list[int]
) -> None:
    calls = [call for call in calls if told_apart(form, thoughts, call[1])][: 1 if once(form) else None]
    if alone(form) and calls:
        text = ""  # its calls are the whole answer
    said = answer(form, thoughts, thought, text, calls)
    expected = (thought if thoughts or form is HARMONY_CALLS else "", text, calls)
    assert read([said], form, thoughts) == expected
    assert read(cut(said, places), form, thoughts) == expected
    assert read(list(said), form, thoughts) == expected


@EACH
@unhurried
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["other", "ge", "get_tide-", "get_tide-22", "al", ""]), arguments), min_size=1, max_size=2
    )
)
def test_no_other_function_is_called(form: CallFormat, calls: list[Call]) -> None:
    said = answer(form, None, "", "", calls[: 1 if once(form) else None])
    for pieces in ([said], list(said)):
        assert read(pieces, form, None)[2] == []
    chosen = offered(choice={"type": "function", "function": {"name": "get"}})
    assert read([answer(form, None, "", "", [("get_tide", {})])], form, None, chosen)[2] == []


def marks(form: CallFormat) -> list[str]:
    of_values = [form.key_open, form.key_close, form.value_close] if isinstance(form, TaggedFormat) else []
    return [mark for mark in (*form.literals, *of_values, "get", "get_tide", "{", "}", '"', "'", "\\", "1", " ", "\n") if mark]


@EACH
@pytest.mark.parametrize("thoughts", [None, THOUGHTS[0], THOUGHTS[-1]], ids=lambda form: form and form.close)
def test_no_answer_raises_or_depends_on_its_tokens(form: CallFormat, thoughts: ThoughtFormat | None) -> None:
    """Marks in any order: calls that break off, marks in texts and arguments, wrong JSON."""
    words = [
        *marks(form),
        *(() if thoughts is None else (thoughts.open, thoughts.close)),
        answer(form, None, "", "a", [("get", {"port": "x"})]),
    ]
    source = random.Random(7)
    for _ in range(200):
        said = "".join(source.choices(words, k=source.randrange(12)))
        said = said[: source.randrange(len(said) + 1)]
        whole = read([said], form, thoughts)
        assert {name for name, _ in whole[2]} <= set(OFFERED)
        places = [source.randrange(len(said) + 1) for _ in range(6)]
        assert read(list(said), form, thoughts) == whole == read(cut(said, places), form, thoughts), said


@EACH
def test_a_mark_inside_an_argument_is_part_of_it(form: CallFormat) -> None:
    ends = form.value_close.strip() if isinstance(form, TaggedFormat) else QUOTE if isinstance(form, GemmaCalls) else "\0"
    ends_messages = ("<|end|>", "<|call|>", "<|start|>", "<|channel|>") if form is HARMONY_CALLS else ()
    for mark in marks(form):
        if ends in mark or any(each in mark for each in ends_messages):
            continue  # Harmony's marks are tokens, which no text can hold
        made = [("get_tide", {"port": f"a {mark}{written(form, [('get', {})], optional=False)} b".replace(ends, "")})]
        if form is HARMONY_CALLS:
            made = [("get_tide", {"port": f"a {mark} b"})]
        said = answer(form, None, "", "", made)
        assert read(list(said), form, None)[2] == made, mark


# The grammar

SENT: Final[list[Call]] = [("get_tide", {"port": "Porto", "n": 3}), ("get", {}), ("all_of", {"on": True})]


def grammar_of(form: CallFormat, offers: Calling, thoughts: ThoughtFormat | None = None) -> str:
    held = AnswerForm(form, HARMONY if form is HARMONY_CALLS else thoughts, Start.FRESH)
    grammars = Grammars()
    rules = form.grammar(grammars, offers, None, held.place)
    return grammars.text(f"start: thought answer\n{held.thought_rules()}{rules}" if held.thinks else rules)


@EACH
def test_a_grammar_admits_what_the_template_writes_and_nothing_else(form: CallFormat, llama: LlamaEngine) -> None:
    def said(*calls: Call, text: str = "") -> str:
        return answer(form, None, "so", text, calls)

    auto, required = grammar_of(form, offered()), grammar_of(form, offered(choice="required"))
    for call in SENT:
        assert admits(llama, auto, said(call)) and admits(llama, required, said(call)), call
    assert admits(llama, auto, said(text="Hello."))
    assert not admits(llama, required, said(text="Hello."))
    for other in (("other", {}), ("get_tide", {"n": "x"}), ("get_tide", {"on": 1})):
        assert not admits(llama, auto, said(other)) and not admits(llama, required, said(other)), other
    if not alone(form):
        assert admits(llama, auto, said(SENT[0], text="Let me see."))
    twice, single = said(*SENT), grammar_of(form, offered(many=False))
    assert admits(llama, auto, twice) is not once(form)
    assert admits(llama, single, said(SENT[0])) and not admits(llama, single, twice)
    named = grammar_of(form, offered(choice={"type": "function", "function": {"name": "get"}}))
    assert admits(llama, named, said(SENT[1])) and not admits(llama, named, said(SENT[0])) and not admits(llama, named, twice)


@pytest.mark.parametrize("form", [form for form in KNOWN_CALLS if form.marker and form is not FUNCTIONARY_3_2], ids=named)
def test_the_grammar_of_a_call_begins_at_its_mark_behind_the_reasoning(form: CallFormat, llama: LlamaEngine) -> None:
    source = grammar_of(form, offered(), THOUGHTS[0])
    made, other = written(form, [SENT[0]]), written(form, [("other", {})])
    for good in (f"<think>{form.marker} {other} so</think>{made}", f"<think>{made}</think>Yes.", f"Hm {made}"):
        assert admits(llama, source, good), good
        assert len(read([good], form, THOUGHTS[0])[2]) == (not good.endswith("Yes."))
    for bad in (f"<think>so</think>{other}", f"<think>so</think>Hm {form.marker}", f"Hm {other}"):
        assert not admits(llama, source, bad), bad
