"""Answers as the page gets them: sealed, rendered, with seams and proofs; and what it is told when one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lacre import problems
from lacre.page import answers
from lacre_backend.api.app import create_app
from parts.bent import without
from parts.chat_app import ChatApp
from parts.chat_page import Visitor, page_of
from parts.echo_engine import EchoEngine
from parts.relay import Relay, refusing

SAID = "The *sea* is deep.\n\n- one\n- two"


@pytest.fixture
def relay() -> Relay:
    return Relay(create_app([EchoEngine(name="tiny", n_ctx=2048)]))


@pytest.fixture
async def inside(relay: Relay, tmp_path: Path) -> AsyncIterator[Visitor]:
    prices = {"*": {"prompt": "1", "cached": "1", "completion": "2.5"}}
    async with page_of(relay, tmp_path, prices=prices) as visitor:
        await visitor.enter()
        yield visitor


def drawn(lines: list[dict[str, Any]]) -> list[Any]:
    """What the page has drawn at the end."""
    held: list[Any] = []
    for line in lines:
        if line["t"] == "blocks":
            assert line["from"] <= len(held)
            held = held[: line["from"]] + line["blocks"]
    return held


def text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(line["d"] for line in lines if line["t"] == "text")


async def test_a_whole_answer(inside: Visitor, relay: Relay) -> None:
    lines = await inside.answer(SAID, model="tiny", params={"temperature": 0, "max_tokens": 400})
    assert text_of(lines) == SAID
    assert drawn(lines) == [
        ["p", ["The ", ["em", ["sea"]], " is deep."]],
        ["ul", [["li", ["one"]], ["li", ["two"]]]],
    ]
    end = lines[-1]
    assert (end["t"], end["finish"], end["model"]) == ("end", "stop", "tiny")
    assert end["usage"]["completion"] == len(SAID) and float(end["cost"]) > 0
    checked = end["verification"]
    assert checked["pinned"] and checked["manifest"]["version"] == 1 and checked["sealed_to"]["pool"] == "default"
    assert checked["receipt"]["completion_tokens"] == len(SAID) and checked["audit"]["index"] >= 0
    assert end["receipts"][0].count(".") == 2 and end["audit"].startswith("c2sp.org/tlog-proof")
    assert end["exchange"]["shape"] == "pad" and end["exchange"]["attempts"] == 1 and not end["parts"]
    [outside] = relay.sealed
    assert b"sea" not in outside.content
    [opened] = relay.opened
    names = {name for name, _ in opened.request.headers}
    assert not names & {"cookie", "origin", "lacre-page", "referer", "user-agent"}
    assert json.loads(opened.request.content)["temperature"] == 0


async def test_a_seam(inside: Visitor, relay: Relay) -> None:
    """The worker is lost in mid-answer, and the next one resumes: the page learns where."""
    left = [12]
    relay.bend = lambda pieces: pieces[: left.pop()] if left else pieces
    lines = await inside.answer("one two three four five six", params={"max_tokens": 400})
    [seam] = [line for line in lines if line["t"] == "seam"]
    assert 0 < seam["at"] < len(text_of(lines)) and text_of(lines) == "one two three four five six"
    before = text_of(lines[: lines.index(seam)])
    assert len(before) == seam["at"], "it is told where it was"
    first, mark, rest = drawn(lines)[0][1]
    assert mark == ["seam", []] and first + rest == text_of(lines)
    assert seam["at"] <= len(first) < seam["at"] + len("three"), "the mark stands there, at the end of the word"
    assert lines[-1]["t"] == "end" and len(lines[-1]["parts"]) == 1 and lines[-1]["usage"]["completion"] >= 27


class Thinking(ChatApp):
    """A model that thinks before it answers."""

    async def stream(self, send: Any, usage: dict[str, Any] | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        deltas = [{"reasoning_content": "<b>hm"}, {"reasoning_content": ", so"}, {"content": "one two three"}]
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        for event in [*map(json.dumps, [*events, {"choices": [], "usage": usage}]), "[DONE]"]:
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body"})


async def test_thoughts(tmp_path: Path) -> None:
    async with page_of(Relay(Thinking()), tmp_path) as visitor:
        await visitor.enter()
        lines = await visitor.answer("count")
    assert [line["d"] for line in lines if line["t"] == "thought"] == ["<b>hm", ", so"]
    assert text_of(lines) == "one two three" and lines[-1]["t"] == "end"


async def test_rendered_later(inside: Visitor) -> None:
    told = await inside.ask("POST", "render", {"texts": [{"text": SAID, "seams": []}, {"text": "a b", "seams": [1]}]})
    assert told.json()["rendered"][1] == [["p", ["a", ["seam", []], " b"]]]
    for wrong in (
        [1],
        [{"text": 1, "seams": []}],
        [{"text": "", "seams": [True]}],
        [{"text": ""}],
        None,
        [{"text": "", "seams": []}] * 201,
    ):
        assert (await inside.ask("POST", "render", {"texts": wrong})).status_code == 400


class TestFailures:
    async def test_a_refusal(self, inside: Visitor, relay: Relay) -> None:
        relay.respond = refusing(problems.FORBIDDEN)
        [line] = await inside.answer(SAID)
        assert line["t"] == "fail" and line["error"]["code"] == "forbidden" and line["error"]["remedy"]

    async def test_an_answer_that_was_altered(self, inside: Visitor, relay: Relay) -> None:
        relay.bend = lambda pieces: without(pieces, 8)
        lines = await inside.answer(SAID, params={"max_tokens": 400})
        assert lines[-1]["t"] == "fail" and lines[-1]["error"]["code"] == "open_error"
        assert lines[-1]["error"]["verification"]["sealed_to"]["pool"] == "default"
        assert SAID.startswith(text_of(lines)) and len(text_of(lines)) < len(SAID)
        assert drawn(lines), "what came is drawn"

    async def test_the_workers_error(self, inside: Visitor) -> None:
        lines = await inside.answer(SAID, model="gone")
        assert lines[-1]["t"] == "fail"

    @pytest.mark.parametrize(
        "question",
        [
            {}, {"messages": []}, {"messages": "x"}, {"messages": [1]}, {"messages": [{}], "params": []},
            {"messages": [{"role": "user", "content": "x"}], "params": {"user": "ada"}},
            {"messages": [{"role": "user", "content": "x"}], "params": {"extra_headers": {"a": "b"}}},
            {"messages": [{"role": "user", "content": "x"}], "params": {"stream": False}},
            {"messages": [{"role": "user", "content": "x"}], "model": 1},
            [], None,
        ],
        ids=str,
    )  # fmt: skip
    async def test_a_question_that_is_none(self, inside: Visitor, relay: Relay, question: Any) -> None:
        told = await inside.ask("POST", "ask", question)
        assert told.status_code in (400, 415, 502) and told.json()["error"]["message"]
        assert not relay.sealed

    async def test_a_gateway_that_is_away(self, inside: Visitor, relay: Relay) -> None:
        """The page opens, and says so."""
        relay.respond = lambda _request: (_ for _ in ()).throw(__import__("httpx2").ConnectError("no"))
        told = (await inside.ask("GET", "state")).json()
        assert told["models"] == [] and told["error"]["code"] == "unreachable" and told["verification"]["manifest"] is None


async def test_the_page_goes_away(inside: Visitor) -> None:
    """Then the request is given up: nothing reads it on."""
    stream = answers.asked(inside.page.client, {"messages": [{"role": "user", "content": "a long " * 50}]})
    lines = answers.told(stream)
    assert json.loads(await anext(lines))["t"] == "text"
    await lines.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    assert stream.usage is None and "given up" in repr(stream)
