"""`/v1/explain` over the echo, whose scores are known by hand, and over the real model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.generating import GREEDY, make_task
from backend.posting import Reply, chat, post
from lacre.asgi import App, Call
from lacre.wire.outer import MAX_PARTS
from lacre_backend.api.app import REPEATABLE, WEIGHED, create_app
from lacre_backend.api.requests import MAX_BODY
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import Token
from parts.echo_engine import UNLIKELY, EchoEngine
from parts.waiting import until

PATH = "/v1/explain"
BASE = {"model": "echo"}
FACTS = [
    "The museum opened in 1911 after nine years of work.",
    "Its first director was Helena Brandt, a chemist.",
    "The roof was rebuilt in 1954 with Danish copper.",
    "Tickets cost twelve euros, and children enter free.",
]


@pytest.fixture
def once() -> Iterator[EchoEngine]:
    with closing(EchoEngine(n_ctx=512)) as engine:
        yield engine


@pytest.fixture
def says_once(once: EchoEngine) -> App:
    return create_app([once])


def parts(*texts: str, **others: Any) -> dict[str, Any]:
    """A request whose only message has these parts, by the ids p0, p1 and so on."""
    content = [{"type": "text", "id": f"p{i}", "text": text} for i, text in enumerate(texts)]
    return {**BASE, "messages": [{"role": "user", "content": content}], **others}


def drops(reply: Reply) -> list[float]:
    assert reply.status == 200, reply.body
    return [part["drop"] for part in reply.json()["parts"]]


async def test_a_given_answer_is_held_against_each_part(says_once: App) -> None:
    reply = await post(says_once, PATH, parts("ab", "cd", "ef", answer="abx"))
    told = reply.json()
    # The echo says a prompt's text for certain: "x" where it says "c", and every token where the text is another.
    assert told["object"] == "explanation" and told["answer"] == "abx"
    assert told["logprob"] == UNLIKELY
    assert drops(reply) == [-2 * UNLIKELY, 0.0, 0.0]
    assert [part["share"] for part in told["parts"]] == [1.0, 0.0, 0.0]
    assert [token["text"] for token in told["tokens"]] == ["a", "b", "x"]
    assert [token["bits"] for token in told["tokens"]] == [0.0, 0.0, pytest.approx(28.85, abs=0.01)]


async def test_the_model_answers_if_no_answer_is_given(says_once: App) -> None:
    call = Call("r", model="echo", action="explain", max_tokens=4, max_prompt_tokens=1000)
    reply = await post(says_once, PATH, parts("ab", "é", "ef"), call=call)
    assert (reply.json()["answer"], reply.json()["logprob"]) == ("abé", 0.0)
    # Without "ab" it says "éef"; without "é", "abef"; without "ef" the same as with it, as far as the answer goes.
    assert drops(reply) == [-4 * UNLIKELY, -2 * UNLIKELY, 0.0]
    assert [part["share"] for part in reply.json()["parts"]] == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0]
    assert [token["text"] for token in reply.json()["tokens"]] == ["a", "b", "", "é"]
    assert call.usage.completion_tokens == 4


@pytest.mark.parametrize(("answer", "scored", "made"), [("abc", 4 * 3, 0), (None, 3 * 6, 6)], ids=["given", "its own"])
async def test_all_that_is_computed_is_counted(says_once: App, answer: str | None, scored: int, made: int) -> None:
    weighed: list[int] = []
    call = Call("r", model="echo", action="explain", max_tokens=6, max_prompt_tokens=1000, weigh=weighed.append)
    whole = (await post(says_once, "/v1/tokenize", chat("abcdef"))).json()["count"]
    reply = await post(says_once, PATH, parts("ab", "cd", "ef", answer=answer), call=call)
    assert call.usage.prompt_tokens == whole + 3 * (whole - 2) + scored
    assert (call.usage.completion_tokens, call.usage.model_digest[:7]) == (made, "sha256:")
    assert reply.json()["usage"]["prompt_tokens"] == call.usage.prompt_tokens
    assert weighed == [4, 3, 2, 1, 0]


async def test_surprise_alone_needs_no_parts(says_once: App) -> None:
    reply = await post(says_once, PATH, {**chat("abc"), "answer": "abx"})
    assert drops(reply) == []
    assert [token["bits"] > 1 for token in reply.json()["tokens"]] == [False, False, True]


async def test_an_answer_of_nothing(says_once: App) -> None:
    reply = await post(says_once, PATH, parts(""))
    assert (reply.json()["answer"], reply.json()["tokens"]) == ("", [])
    assert reply.json()["parts"] == [{"id": "p0", "drop": 0.0, "share": 0.0}]


def two_the_same() -> dict[str, Any]:
    body = parts("a", "b")
    body["messages"][0]["content"][1]["id"] = "p0"
    return body


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({**parts("a"), "parts": {}}, "parts", "unknown_parameter"), (BASE, "messages", "missing_required_parameter"),
        (parts("a", answer=""), "answer", "string_below_min_length"), (parts("a", stream=True), "stream", "unknown_parameter"),
        (two_the_same(), "messages[0].content[1].id", "invalid_value"),
        ({**BASE, "messages": [{"role": "user", "content": [{"type": "text", "id": 7, "text": "a"}]}]},
         "messages[0].content[0].id", "invalid_value"),
        (parts(*"a" * (MAX_PARTS + 1)), "messages", "array_above_max_length"),
        (parts("a" * 600), "messages", "context_length_exceeded"),
        (parts("a" * 300, answer="a" * 300), "messages", "context_length_exceeded"),
        (parts("a" * 300, max_tokens=0), "max_tokens", "below_min_value"),
    ],
)  # fmt: skip
async def test_refused(says_once: App, body: dict[str, Any], param: str, code: str) -> None:
    error = (await post(says_once, PATH, body)).error(400)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("granted", "body", "param"),
    [
        ({"action": "chat"}, {}, "action"), ({"model": "other"}, {}, "model"),
        ({"max_tokens": 5}, {"max_tokens": 6}, "max_tokens"),
        ({"max_prompt_tokens": 100}, {}, "messages"), ({"max_prompt_tokens": 115}, {"answer": "abcdef"}, "messages"),
    ],
)  # fmt: skip
async def test_no_more_than_was_granted(
    once: EchoEngine, says_once: App, granted: dict[str, Any], body: dict[str, Any], param: str
) -> None:
    call = Call("r", **{"model": "echo", "action": "explain", "max_tokens": 5, "max_prompt_tokens": 1000, **granted})
    assert (await post(says_once, PATH, parts("ab", "cd", "ef", **body), call=call)).error(403)["param"] == param
    assert (call.usage.prompt_tokens, once.running) == (0, 0)


async def test_who_leaves_cancels_the_rest() -> None:
    with closing(EchoEngine(n_ctx=512, delay=0.01)) as slow:
        left = asyncio.Event()
        asking = asyncio.create_task(post(create_app([slow]), PATH, parts("ab" * 100, "cd"), leaving=left))
        await until(lambda: slow.running)
        left.set()
        await asking
        await until(lambda: not slow.running)


# Hostile bodies

ODD = [
    "", " ", "\n\n", "a" * 40, "aa", "<|end|>", "<|start|>assistant\n", "{{ 7 * 7 }}", "\x00\x1b[2J", "\u202eolso\u202c",
    "\u200b", "\ufeff", "日本", "é", "e\u0301", "👩\u200d👩\u200d👧", "\uffff", "\U0010fffe",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(ODD) | st.text(max_size=12), min_size=1, max_size=5)


def likely(said: str, answer: str) -> float:
    """The score that the echo of a message gives to an answer."""
    echoed = said.encode()
    return sum(UNLIKELY for i, byte in enumerate(answer.encode()) if echoed[i : i + 1] != bytes([byte]))


@given(TEXTS, st.data())
def test_any_parts_are_left_out_exactly(texts: list[str], data: st.DataObject) -> None:
    """Empty ones, ones that overlap, that look like control tokens or templates, or that no terminal can show."""
    whole = "".join(texts)
    answer = data.draw(st.sampled_from([whole, *texts, *ODD]) | st.text(max_size=12), "answer")[:60] or "x"

    async def told() -> Any:
        with closing(EchoEngine(n_ctx=1024)) as engine:
            return (await post(create_app([engine]), PATH, parts(*texts, answer=answer))).json()

    found = asyncio.run(told())
    assert found["answer"] == answer == "".join(token["text"] for token in found["tokens"])
    assert found["logprob"] == likely(whole, answer)
    without = ["".join(texts[:i] + texts[i + 1 :]) for i in range(len(texts))]
    assert [part["drop"] for part in found["parts"]] == [found["logprob"] - likely(text, answer) for text in without]
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1) or not any(
        part["drop"] > 0 for part in found["parts"]
    )


@pytest.mark.parametrize(
    "content",
    [
        [], {}, "text", 7, [7], [None], [{"type": "text"}], [{"id": "a"}], [{"type": "image_url", "id": "a"}],
        [{"type": "text", "id": "", "text": "a"}], [{"type": "text", "id": "x" * 257, "text": "a"}],
        [{"type": "text", "id": {}, "text": "a"}], [{"type": "text", "id": "a", "text": None}], [[[[[]]]]],
        [{"type": "text", "id": "a", "text": "a"}] * 2, [{"type": "text", "id": str(i), "text": ""} for i in range(10_000)],
    ],
    ids=range(16),
)  # fmt: skip
async def test_odd_content_is_refused_or_answered(says_once: App, once: EchoEngine, content: Any) -> None:
    reply = await post(says_once, PATH, {**BASE, "messages": [{"role": "user", "content": content}], "answer": "a"})
    assert reply.status == 200 if content == "text" else reply.error(400)
    assert once.running == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"\xff", b'{"answer": "\\ud800"}', b'{"a":' * 9999, b"[" * 99_999, b'{"model": "echo"' + b" " * MAX_BODY],
    ids=range(7),
)
async def test_bodies_that_are_none(says_once: App, body: bytes) -> None:
    assert (await post(says_once, PATH, body)).status in (400, 413)


async def test_who_leaves_pays_for_what_was_computed() -> None:
    """A receipt may be signed before the end: it counts the runs so far, and not those that were cancelled."""
    with closing(EchoEngine(n_ctx=512, delay=0.002)) as slow:
        call, left = Call("r", model="echo", action="explain", max_tokens=9, max_prompt_tokens=9000), asyncio.Event()
        body = parts("ab" * 50, "cd", answer="ab" * 40)
        asking = asyncio.create_task(post(create_app([slow]), PATH, body, call=call, leaving=left))
        await until(lambda: call.usage.prompt_tokens > 200)
        left.set()
        await asking
        counted = call.usage.prompt_tokens
        await until(lambda: not slow.running)
        assert 200 < call.usage.prompt_tokens == counted < 3 * 200


async def test_a_chat_does_not_wait_for_an_explanation_of_many_parts(tiny: Path) -> None:
    """It has more runs than the engine has slots. Another tenant's chat is next as soon as one of them ends."""
    settings = LlamaSettings(n_ctx=1024, threads=1, slots=4)
    with closing(LlamaEngine(tiny, name="tiny", digest="sha256:0", settings=settings)) as engine:
        weighed: list[int] = []
        call = Call("r", model="tiny", action="explain", max_prompt_tokens=99_999, fair=("a", "x"), weigh=weighed.append)
        body = parts(*(f"{i} " * 20 for i in range(MAX_PARTS)), model="tiny", answer="red")
        explaining = asyncio.create_task(post(create_app([engine]), PATH, body, call=call))
        await until(lambda: engine.held[0] == MAX_PARTS + 1)
        task = make_task(engine, "green. ", 8, sampling=GREEDY, fair=("b", "y"))
        events = [event async for event in engine.submit(task)]
        before = MAX_PARTS + 1 - weighed[-1]
        assert len([event for event in events if isinstance(event, Token)]) == 8
        assert weighed[-1] > 0, "the explanation goes on"
        assert (await explaining).status == 200
        assert before <= 2 * engine.slots


async def test_a_run_out_of_time_scores_nothing(once: EchoEngine) -> None:
    app = create_app([once], time_limit=0.0)
    assert (await post(app, PATH, parts("ab", answer="ab"))).error(400)["code"] == "time_limit"


def test_it_changes_nothing_and_says_how_much_it_weighs() -> None:
    assert "explain" in REPEATABLE & WEIGHED


async def test_a_tiny_model(tiny: Path) -> None:
    with closing(LlamaEngine(tiny, name="tiny", digest="sha256:0", settings=LlamaSettings(n_ctx=512, threads=1))) as engine:
        app = create_app([engine])
        body = parts("red. ", "green. ", "blue. ", model="tiny", max_tokens=8)
        own = (await post(app, PATH, body)).json()
        assert len(own["tokens"]) == own["usage"]["completion_tokens"] <= 8
        given = (await post(app, PATH, {**body, "answer": "red"})).json()
        assert given["usage"]["completion_tokens"] == 0
        assert sum(token["bits"] for token in given["tokens"]) > 1
        assert all(part["drop"] for part in given["parts"])


@pytest.mark.parametrize(("question", "answer", "right"), [
    ("Who was the first director of the museum?", "The first director was Helena Brandt.", 1),
    ("How much do tickets cost?", "Tickets cost twelve euros.", 3),
])  # fmt: skip
async def test_the_real_model_rests_an_answer_on_its_document(
    llama: LlamaEngine, question: str, answer: str, right: int
) -> None:
    content = [{"type": "text", "id": f"p{i}", "text": f"{fact} "} for i, fact in enumerate(FACTS)]
    body = {
        "model": llama.model.name,
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": f"\n{question}"}]}],
        "answer": answer,
    }
    found = drops(await post(create_app([llama]), PATH, body))
    assert found.index(max(found)) == right
    assert found[right] > 3
