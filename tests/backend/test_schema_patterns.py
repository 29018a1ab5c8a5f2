"""Patterns of JSON schemas against Python's own reader of expressions: looks ahead, anchors and groups anywhere."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre_backend.api.schema.patterns import NotRegular, Patterns

# Each with texts in which it is found, and texts in which it is not.
CASES: dict[str, tuple[list[str], list[str]]] = {
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


@pytest.mark.parametrize("pattern", CASES)
def test_a_pattern_is_found_where_it_is(pattern: str) -> None:
    patterns, (found, lost) = Patterns(), CASES[pattern]
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
