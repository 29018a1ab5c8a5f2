"""The stop filter and the UTF-8 stream: properties, and the cases that break naive ones."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre_backend.engine.text import StopFilter, TextStream

unhurried = settings(deadline=None)  # the machine is shared
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def split(text: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def expected(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The rule as a reader would apply it: at the first end of any stop string, the longest one that ends there goes."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@unhurried
@given(st.text("abcd", max_size=40), stops, st.lists(st.integers(0, 100)))
@example("aaaab", ["aab"], [1, 3])  # a partial match that begins again inside itself
@example("x START", ["STOP"], [4])
@example("abc", ["bc", "c"], [])  # both end at the same place: the longest
@example("abcd", ["abcd", "b"], [])  # the one that ends first, though the other began first
@example("énd.", ["énd"], [1])
def test_output_does_not_depend_on_token_boundaries(text: str, stop: list[str], cuts: list[int]) -> None:
    stream = TextStream(stop)
    out = "".join(stream.push(piece) for piece in split(text.encode(), cuts))
    held = "" if stream.stopped else stream.flush()
    assert (out + held, stream.matched) == expected(text, stop)


@unhurried
@given(st.text("abcd", max_size=20), st.text("abcd", max_size=8), stops)
def test_what_is_shown_is_never_taken_back(text: str, later: str, stop: list[str]) -> None:
    stream = StopFilter(stop)
    shown = stream.push(text)
    whole, _ = expected(text + later, stop)
    assert whole.startswith(shown)


@unhurried
@given(st.text("abcd", max_size=20), stops)
def test_no_more_is_held_back_than_needed(text: str, stop: list[str]) -> None:
    stream = StopFilter(stop)
    shown = stream.push(text)
    if not stream.stopped and shown != text:
        assert any(s.startswith(text[len(shown) :]) for s in stop)


@unhurried
@given(st.text(max_size=20), st.lists(st.integers(0, 100)))
def test_code_points_come_whole(text: str, cuts: list[int]) -> None:
    stream = TextStream(())
    pieces = [stream.push(piece) for piece in split(text.encode(), cuts)]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@unhurried
@given(st.binary(max_size=30), st.lists(st.integers(0, 100)))
def test_broken_utf8_becomes_what_the_whole_would(data: bytes, cuts: list[int]) -> None:
    stream = TextStream(())
    assert "".join(map(stream.push, split(data, cuts))) + stream.flush() == data.decode("utf-8", "replace")


def test_nothing_comes_after_the_stop() -> None:
    stream = StopFilter(["."])
    assert stream.push("a.b") == "a"
    assert stream.stopped
    assert stream.push("c") == ""
    assert stream.flush() == ""
