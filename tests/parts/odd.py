"""Odd values, and calls of any function with them: what the signature asks for, but for one argument or two.

A call's other arguments are left out where they have a default, and taken from `usual` by their name where they have none.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import decimal
import inspect
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from hypothesis import strategies as st

_NAN: Final = float("nan")


class Odd:
    """An object that no function expects."""

    def __repr__(self) -> str:
        return "Odd()"


def _in_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _deep() -> Any:
    found: Any = []
    for _ in range(5000):
        found = [found]
    return found


TEXTS: Final = (
    "", " ", "\0", "a\0b", "\ud83d", "caf\udce9", "a\nb\r\n", "\x1b[31m", "\u202e", "é" * 300, "NaN", "-1", "٣", "1e999",
    "null", "/nonexistent/x", "/dev/null", "/", "https://", "https://[", "http://a..b", "lacre://x?trust=", "🔒", "Bearer a b",
    "http://[::1%25x]:99999", "data:,", "{", "[" * 5000, '{"a": 1e999}', "😀" * 2000, "=", "AAAA", "A" * 43, ".", "~nobody/x",
)  # fmt: skip
NUMBERS: Final = (
    0, -1, 1, True, 2**31, 2**63, 2**64, -(2**70), 10**4400, 0.5, -0.0, 1e308, 5e-324, float("inf"), -float("inf"), _NAN,
)  # fmt: skip
OTHERS: Final = (
    None, b"", b"\xff\xfe", bytearray(b"x"), memoryview(b"x"), [], {}, (), set(), [None], [b"a"], {"a": _NAN}, {1: 2}, range(3),
    {"\ud83d": 1}, {"role": "user"}, [{"role": "user", "content": "\ud83d"}], [{"role": "user", "content": {1}}], _in_itself(),
    _deep(), Odd(), Exception("x"), Path("/nonexistent/\ud83d"), Path("a\0b"), PurePosixPath("x"), decimal.Decimal("NaN"),
    datetime.datetime(1, 1, 1), iter("ab"), ..., NotImplemented, *(
        lambda *_, answer=answer, **__: answer for answer in (None, 5, "x", b"x", _NAN, ())
    ),
)  # fmt: skip

odd_values: Final = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS),
    st.text(st.characters(codec=None), max_size=20),
    st.binary(max_size=80),
    st.integers(),
    st.floats(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)

# Members of a chat request, and others that somebody may think are some: what `**params` takes.
PARAMS: Final = (
    "temperature", "max_tokens", "max_completion_tokens", "model", "n", "stop", "seed", "tools", "tool_choice", "stream",
    "user", "stream_options", "response_format", "logit_bias", "logprobs", "top_p", "metadata", "class", "\ud83d", "",
)  # fmt: skip


@st.composite
def calls(draw: st.DrawFn, function: Callable[..., Any], usual: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for the function: of the form that its signature asks for, some of them odd."""
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in ("self", "cls")]
    odd = draw(st.sets(st.sampled_from([each.name for each in parameters]), max_size=2)) if parameters else set()
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for each in parameters:
        if each.kind is each.VAR_POSITIONAL:
            positional += draw(st.lists(odd_values, max_size=2))
        elif each.kind is each.VAR_KEYWORD:
            names = options(function) or PARAMS
            named |= draw(st.dictionaries(st.sampled_from(names), odd_values, max_size=2)) if each.name in odd else {}
        elif each.name not in odd and each.default is not each.empty:
            continue
        else:
            value = draw(odd_values) if each.name in odd or each.name not in usual else usual[each.name]
            if each.kind is each.POSITIONAL_ONLY:
                positional.append(value)
            else:
                named[each.name] = value
    return positional, named


def options(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names that `**options: Unpack[...]` has; none where any are taken."""
    plain = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    hints = typing.get_type_hints(plain) if inspect.isroutine(plain) else {}
    named = [typing.get_args(hint)[0] for hint in hints.values() if typing.get_origin(hint) is typing.Unpack]
    return tuple(name for each in named for name in typing.get_type_hints(each))


def outcome(function: Callable[..., Any], positional: list[Any], named: dict[str, Any]) -> Any:
    """What a call comes to: an awaitable is awaited, and what can be iterated over is read to its end."""
    came = function(*positional, **named)
    if isinstance(came, contextlib.AbstractContextManager) and isinstance(came, contextlib.ContextDecorator):  # of a stream
        with came as answer:
            return answer.read()
    if isinstance(came, contextlib.AbstractAsyncContextManager) and isinstance(came, contextlib.AsyncContextDecorator):
        return asyncio.run(_read(came))
    if isinstance(came, Awaitable | AsyncIterator):
        return asyncio.run(_awaited(came))
    if isinstance(came, Iterator):
        return list(came)
    return came


async def _read(came: Any) -> Any:
    async with came as answer:
        return await answer.aread()


async def _awaited(came: Any) -> Any:
    if isinstance(came, Awaitable):
        came = await came
    if isinstance(came, AsyncIterator):
        return [each async for each in came]
    return came
