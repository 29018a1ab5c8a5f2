"""`/v1/completions` with several prompts, and with prompts of token ids."""

from __future__ import annotations

from typing import Any

import pytest

from backend.posting import TEXT, post
from lacre.asgi import App, Call
from parts.echo_engine import BOS, END, START


def asked(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": prompt, "max_tokens": 50, **fields}


def texts(reply: Any) -> list[tuple[int, str]]:
    return [(choice["index"], choice["text"]) for choice in reply.json()["choices"]]


async def test_each_prompt_has_its_choices_in_order(app: App) -> None:
    reply = await post(app, TEXT, asked(["sea", "lake é"], n=2))
    assert texts(reply) == [(0, "sea"), (1, "sea"), (2, "lake é"), (3, "lake é")]
    alone = [(await post(app, TEXT, asked(prompt, n=2))).json()["usage"] for prompt in ("sea", "lake é")]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert reply.json()["usage"][name] == sum(usage[name] for usage in alone)


async def test_a_stream_of_several_prompts(app: App) -> None:
    events = (await post(app, TEXT, asked(["sea", "lake"], stream=True, stream_options={"include_usage": True}))).events()
    said = ["", ""]
    for event in events[:-1]:
        said[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert said == ["sea", "lake"]
    assert events[-1]["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize(
    "prompt", [list(b"sea"), [list(b"sea")], [BOS.id, *b"sea"], [[BOS.id, *b"sea"]], "sea", ["sea"]], ids=str
)
async def test_token_ids_are_the_same_prompt_as_their_text(app: App, prompt: Any) -> None:
    reply = await post(app, TEXT, asked(prompt))
    assert texts(reply) == [(0, "sea")]
    assert reply.json()["usage"]["prompt_tokens"] == 4


async def test_texts_and_ids_together(app: App) -> None:
    assert texts(await post(app, TEXT, asked(["sea", list(b"lake")]))) == [(0, "sea"), (1, "lake")]


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        ([END.id], "prompt", "invalid_value"), ([[97], [97, START.id]], "prompt[1]", "invalid_value"),
        ([BOS.id, BOS.id, 97], "prompt", "invalid_value"), ([97, 100_000], "prompt", "invalid_value"),
        ([97, -1], "prompt", "invalid_value"), ([97, 2**70], "prompt", "invalid_value"),
        ([97, "a"], "prompt", "invalid_type"), ([[97], 98], "prompt[1]", "invalid_type"), ([True], "prompt", "invalid_type"),
        ([1.5], "prompt", "invalid_type"), (["a", []], "prompt[1]", "invalid_type"), ({}, "prompt", "invalid_type"),
        (5, "prompt", "invalid_type"), ([], "prompt", "empty_array"), (["a"] * 65, "prompt", "array_above_max_length"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
async def test_what_is_no_prompt(app: App, prompt: Any, param: str, code: str) -> None:
    error = (await post(app, TEXT, asked(prompt))).error(400)
    assert (error["param"], error["code"]) == (param, code)


async def test_choices_are_bounded_over_all_prompts(app: App) -> None:
    assert len(texts(await post(app, TEXT, asked(["a"] * 4, n=16)))) == 64
    assert (await post(app, TEXT, asked(["a"] * 5, n=16))).error(400)["code"] == "array_above_max_length"


async def test_the_grant_covers_all_prompts(app: App) -> None:
    """Its ceilings are sums, and each choice has an equal part of a ceiling that the request leaves open."""
    call = Call("c1", action="complete", model="echo", max_tokens=8, max_prompt_tokens=20)
    body = {"model": "echo", "prompt": ["abcdef", "ghijkl"]}
    assert texts(await post(app, TEXT, body, call=call)) == [(0, "abcd"), (1, "ghij")]
    for refused in (body | {"max_tokens": 5}, body | {"prompt": ["abcdef"] * 3}, body | {"prompt": ["a"] * 9}):
        assert (await post(app, TEXT, refused, call=call)).error(403)["code"] == "grant_mismatch"
