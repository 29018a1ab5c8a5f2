"""Schemas of others: the official JSON-Schema-Test-Suite, pydantic models in each way that clients send them, patterns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.lib._parsing import type_to_response_format_param

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import parse_chat
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.schema.patterns import NotRegular, Patterns
from lacre_backend.api.tools.format import HERMES
from lacre_backend.api.tools.parts import Argued
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.thoughts import AnswerForm
from parts.drawing import Unfinished, drawn
from parts.pydantic_models import MODELS
from parts.schema_suite import SUITE, Row, rows, table

PAGE = Path(__file__).parents[2] / "docs" / "schemas.md"
WANTED = {"pattern", "minimum", "multipleOf", "oneOf", "ref", "prefixItems", "const", "enum"}


@pytest.fixture(scope="module")
def found() -> list[Row]:
    if not SUITE.is_dir():
        pytest.skip(f"no JSON-Schema-Test-Suite at {SUITE}")
    return rows()


def test_nothing_invalid_is_admitted_and_nothing_valid_refused_without_a_reason(found: list[Row]) -> None:
    assert [wrong for row in found for wrong in row.wrong] == []


def test_four_of_five_schemas_are_enforced_and_the_others_refused_by_name(found: list[Row]) -> None:
    schemas, refused = sum(row.schemas for row in found), [keyword for row in found for keyword in row.refused]
    assert len(refused) <= 0.2 * schemas
    assert all(re.fullmatch(r"\$?[A-Za-z]+", keyword) for keyword in refused)
    assert {row.name for row in found if len(row.refused) < row.schemas} >= WANTED


def test_the_page_has_the_table(found: list[Row]) -> None:
    """`PYTHONPATH=tests .venv/bin/python -m parts.schema_suite` prints it anew."""
    assert table(found) in PAGE.read_text()


# Models as people write them with pydantic: what a grammar admits is valid

SEEDS = range(5)
# Sets of lists or objects: refused by name where strict.
REFUSED = {"UniqueObjects": "uniqueItems"}
# Sets of any text or number, whose repeated items are told only where an answer is JSON alone: refused as strict tools.
REFUSED_AS_TOOLS = REFUSED.keys() | {"Tags"}
# What pydantic wants beyond the schema that it writes, by which an answer is valid: a decimal in a text, a URL's scheme, a text
# that is JSON, keys that are numbers, and keys that match a pattern where others are not forbidden.
BEYOND = {"Money", "Links", "Moments", "Odd", "Records", "Keyed"}


def grammar(**fields: Any) -> str:
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat(json.dumps(asked).encode()).grammar(AnswerForm(HERMES), Grammars()) or ""


def check(name: str, answer: str) -> None:
    if name in BEYOND:
        value = json.loads(answer)
        assert value.keys() >= set(MODELS[name].model_json_schema().get("required", ()))
    else:
        MODELS[name].model_validate_json(answer)


def answers(text: str) -> list[str]:
    found = []
    for seed in SEEDS:
        try:
            found.append(drawn(text, seed))
        except Unfinished:  # of a model that holds itself
            continue
    assert len(found) > 1
    return found


assert len(MODELS) - len(REFUSED) >= 40


@pytest.mark.parametrize("name", MODELS)
def test_as_openais_parse_sends_them(name: str) -> None:
    form = type_to_response_format_param(MODELS[name])
    if name in REFUSED:
        with pytest.raises(RequestRefused, match=f"'{REFUSED[name]}' at #/properties/"):
            grammar(response_format=form)
        return
    for answer in answers(grammar(response_format=form)):
        check(name, answer)


@pytest.mark.parametrize("name", MODELS)
def test_as_pydantic_writes_them(name: str) -> None:
    """Strict, and not: of a model whose options have defaults, a property that tells them apart may be left out."""
    described = {"name": "m", "schema": MODELS[name].model_json_schema()}
    for strict in (False, True):
        if not (strict and name in REFUSED):
            form = {"type": "json_schema", "json_schema": {**described, "strict": strict}}
            for answer in answers(grammar(response_format=form)):
                check(name, answer)


@pytest.mark.parametrize("name", MODELS)
def test_as_tools(name: str) -> None:
    tool: Any = openai.pydantic_function_tool(MODELS[name], name="answer")
    plain = {"type": "function", "function": {"name": "answer", "parameters": MODELS[name].model_json_schema()}}
    if tool["function"]["parameters"].get("type") != "object":  # a list at the root is no tool's
        return
    for each in (plain,) if name in REFUSED_AS_TOOLS else (tool, plain):
        for answer in answers(grammar(tools=[each], tool_choice={"type": "function", "function": {"name": "answer"}})):
            reader = CallReader(HERMES, ["answer"], "seed")
            parts = [*reader.push(answer), *reader.finish()]
            check(name, "".join(part.text for part in parts if isinstance(part, Argued)))


# Patterns, against Python's own reader of expressions: looks ahead, anchors and groups anywhere

# Each with texts in which it is found, and texts in which it is not.
PATTERNS: dict[str, tuple[list[str], list[str]]] = {
    r"^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{8,12}$": (["Abcdefg1"], ["abcdefg1", "ABCDEFGH", "A1bbbbbbbbbbbbb"]),
    r"^(?!admin$)[a-z]{3,8}$": (["admins", "adm"], ["admin", "ad"]),
    r"^a+$|^b+$": (["aa", "b"], ["ab", ""]),
    r"^$|^x": (["", "xy"], ["y"]),
    r"(^a|b)c": (["ac", "xbc"], ["xac"]),
    r"foo(?!bar)": (["foo", "foobarfoo"], ["foobar"]),
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        ["a@b.cc", "a.b@c-d.ef.gh"], ["a..b@b.cc", ".a@b.cc", "a@b"]),
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        ["P1W", "P1Y2M", "PT5M", "P1DT2H"], ["PT", "P", "P1DT", "P1W2D"]),
    r"^(?=[\s\S]*\p{Extended_Pictographic})[\p{Extended_Pictographic}\p{Emoji_Component}]+$": (["\U0001f600"], ["a", "1"]),
    r"\p{Letter}cole": (["\xe9cole"], ["1cole"]),
    r"^\u{1F600}$": (["\U0001f600"], ["x"]),
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_found_where_it_is(pattern: str) -> None:
    patterns, (found, lost) = Patterns(), PATTERNS[pattern]
    assert [text for text in found if not patterns.matches(pattern, text)] == []
    assert [text for text in lost if patterns.matches(pattern, text)] == []


@pytest.mark.parametrize(
    "pattern",
    [r"(a", r"a)", "*a", "a**", "(?<=a)b", r"\bx", "(?=a)*b", r"(a)\1", "(?i)a", "[", r"\p{Nope}", "a$b", "a^b", "x" * 1001,
     "(^|a)" * 7],
)  # fmt: skip
def test_what_is_not_regular_is_refused(pattern: str) -> None:
    with pytest.raises(NotRegular):
        Patterns().read(pattern)


atoms = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", r"\d", "^", "$"])
expressions = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda ways: f"(?:{'|'.join(ways)})")
        | st.tuples(st.sampled_from(["(?={})", "(?!{})", "({})"]), inner).map(lambda made: made[0].format(made[1]))
        | st.tuples(st.sampled_from(["({})?", "({})*", "({}){{1,2}}"]), inner).map(lambda made: made[0].format(made[1]))
    ),
    max_leaves=7,
)


@example(pattern="(?=(?!^))", texts=["1"])
@given(pattern=expressions, texts=st.lists(st.text("ab1", max_size=4), max_size=5))
@settings(max_examples=300, deadline=None)
def test_it_agrees_with_python_or_refuses(pattern: str, texts: list[str]) -> None:
    patterns = Patterns()
    try:
        patterns.read(pattern)
    except NotRegular:
        return
    for text in texts:
        assert patterns.matches(pattern, text) == (re.search(pattern.replace("$", r"\Z"), text) is not None), text
