"""The logger `lacre`: one line for each call, without content; and `lacre.info`, which finds an exchange behind an object."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx2
import openai
import pytest

import lacre
from lacre import problems
from lacre.evidence.recent import RecentExchanges
from lacre_backend.api.app import create_app
from parts.chat_app import ChatApp
from parts.relay import Relay, Wire, connect, connect_async, refusing, served
from parts.scripted_engine import ScriptedEngine

SECRET = "the prompt that nobody logs"


class Named(Wire):
    """A gateway that gives each request the next of these ids, as its headers have them."""

    def __init__(self, relay: Relay, ids: Iterator[str]) -> None:
        super().__init__(relay)
        self._ids = ids

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        response.headers["lacre-request-id"] = next(self._ids)
        return response


def numbered(prefix: str) -> Iterator[str]:
    return (f"{os.getpid()}-{prefix}-{number}" for number in range(1000))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lacre"]


class TestLog:
    def test_one_line_for_each_call(self, relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "lacre")
        with connect(relay, transport=Named(relay, numbered("log"))) as client:
            client.chat(SECRET)
            client.chat_stream(SECRET).reply()
            with client.chat_stream(SECRET) as stream:
                next(stream)
            with pytest.raises(lacre.ApiError):
                client.chat([])
        said = lines(caplog)
        times = r" attempts=1 head=\d+\.\d{3} total=\d+\.\d{3}"
        for line, status, outcome in zip(said, (200, 200, 200, 400), ("whole", "whole", "(whole|left)", "whole"), strict=True):
            shown = rf"request_id=\d+-log-\d action=chat model=tiny status={status} outcome={outcome}{times}"
            assert re.fullmatch(shown, line), line
        assert SECRET not in caplog.text and "one two" not in caplog.text

    def test_refusals_and_errors(self, relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "lacre")
        relay.respond = refusing(problems.FORBIDDEN)
        with connect(relay, retries=0) as client, pytest.raises(lacre.Forbidden):
            client.chat(SECRET)
        relay.respond = lambda _request: served(500)
        with connect(relay, retries=0) as client, pytest.raises(lacre.LacreError):
            client.chat(SECRET)
        refused, failed = lines(caplog)
        assert "action=chat model=tiny status=403 outcome=refused attempts=1" in refused
        assert re.search(r"status=- outcome=[A-Z]\w+ attempts=0", failed)

    def test_async(self, relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "lacre")

        async def ask() -> None:
            async with connect_async(relay) as client:
                await client.chat(SECRET)

        asyncio.run(ask())
        assert len(lines(caplog)) == 1 and "outcome=whole" in caplog.text

    def test_silent_by_default(self, client: lacre.Client, capfd: pytest.CaptureFixture[str]) -> None:
        client.chat(SECRET)
        assert "request_id" not in "".join(capfd.readouterr())


def read(stream: Any) -> Any:
    """The stream, once it was read to its end."""
    for _ in stream:
        pass
    return stream


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Completion:
    _request_id: str
    usage: Usage


class TestInfo:
    @pytest.fixture
    def program(self, relay: Relay) -> Iterator[openai.OpenAI]:
        ids = numbered("info")
        with connect(relay, transport=Named(relay, ids)) as client:
            yield openai.OpenAI(http_client=client, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)

    def test_of_a_completion_a_raw_response_and_a_stream(self, program: openai.OpenAI) -> None:
        turns: list[Any] = [{"role": "user", "content": "Hello."}]
        ways: list[Callable[[], Any]] = [
            lambda: program.chat.completions.create(model="tiny", messages=turns),
            lambda: program.chat.completions.with_raw_response.create(model="tiny", messages=turns),
        ]
        digests = set()
        for ask in ways:
            told = lacre.info(ask())
            assert told.receipt is not None and told.receipt.completion_tokens == 3 and told.attempts == 1
            assert (
                told.audit is not None
                and told.verification.receipt is not None
                and (told.action, told.model) == ("chat", "tiny")
            )
            digests.add(told.receipt.enc)
        stream = program.chat.completions.create(model="tiny", messages=turns, stream=True)
        assert len(list(stream)) >= 3
        streamed = lacre.info(stream).receipt
        assert streamed is not None and len({*digests, streamed.enc}) == 3

    def test_of_each_api_of_both_packages(self) -> None:
        """Whole answers, plain streams, the packages' own stream helpers, and an error."""
        said: list[Any] = [{"role": "user", "content": "Hello."}]
        with closing(ScriptedEngine(lambda _: "It rains.")) as engine:
            relay = Relay(create_app([engine]), model="scripted")
            with connect(relay, transport=Named(relay, numbered("both"))) as client:
                theirs = anthropic.Anthropic(http_client=client, base_url=lacre.ORIGIN, api_key="sealed", max_retries=0)
                program = openai.OpenAI(http_client=client, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)
                message: dict[str, Any] = {"model": "scripted", "max_tokens": 20, "messages": said}
                found = [
                    lacre.info(theirs.messages.create(**message)),
                    lacre.info(theirs.messages.with_raw_response.create(**message)),
                    lacre.info(read(theirs.messages.create(**message, stream=True))),
                    lacre.info(program.responses.create(model="scripted", input=said)),
                    lacre.info(read(program.responses.create(model="scripted", input=said, stream=True))),
                    lacre.info(program.completions.create(model="scripted", prompt="Hello.")),
                ]
                with theirs.messages.stream(**message) as helped:
                    found.append(lacre.info(read(helped)))
                with program.responses.stream(model="scripted", input=said) as responding:
                    found.append(lacre.info(read(responding)))
                with program.chat.completions.stream(model="scripted", messages=said) as chatting:
                    found.append(lacre.info(read(chatting)))
                with pytest.raises(anthropic.BadRequestError) as refused:
                    theirs.messages.create(**{**message, "messages": []})
                assert lacre.info(refused.value).attempts == 1 and refused.value.request_id
        assert all(each.receipt is not None and each.receipt.completion_tokens for each in found)
        assert len({each.receipt.enc for each in found if each.receipt is not None}) == len(found)

    @pytest.mark.parametrize(("fresh", "cached", "known"), [(5, 2, True), (7, 0, True), (7, 2, False), (5, None, False)])
    def test_anthropic_counts_what_the_cache_had_apart(self, relay: Relay, fresh: int, cached: int | None, known: bool) -> None:
        name = f"{os.getpid()}-{fresh}-{cached}"
        with connect(relay, transport=Named(relay, iter(["manifest", name]))) as client:
            client.chat("Hello.")
        answer = SimpleNamespace(
            _request_id=name, usage=SimpleNamespace(input_tokens=fresh, cache_read_input_tokens=cached, output_tokens=3)
        )
        if known:
            assert lacre.info(answer).model == "tiny"
        else:
            with pytest.raises(lacre.UsageError, match="another one"):
                lacre.info(answer)

    def test_an_id_that_the_gateway_gave_twice(self, relay: Relay) -> None:
        again = iter([f"{os.getpid()}-twice"] * 9)
        with connect(relay, transport=Named(relay, again)) as client:
            program = openai.OpenAI(http_client=client, base_url=lacre.BASE_URL, api_key="sealed", max_retries=0)
            for _ in range(2):
                completion = program.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(lacre.UsageError, match="right after"):
            lacre.info(completion)

    def test_an_id_of_another_answer(self, relay: Relay) -> None:
        name = f"{os.getpid()}-other"
        with connect(relay, transport=Named(relay, iter(["manifest", name]))) as client:
            client.chat("Hello.")
        assert lacre.info(Completion(name, Usage(7, 3))).model == "tiny"
        with pytest.raises(lacre.UsageError, match="another one"):
            lacre.info(Completion(name, Usage(7, 4)))

    @pytest.mark.parametrize("odd", [None, "x", 5, {"extensions": 3}, httpx2.Response(200)], ids=repr)
    def test_other_objects(self, odd: object) -> None:
        with pytest.raises(lacre.UsageError, match=r"lacre\.info"):
            lacre.info(odd)

    def test_the_oldest_go_and_no_content_stays(self, relay: Relay, app: ChatApp) -> None:
        kept = RecentExchanges(2)
        with connect(relay, transport=Named(relay, numbered("few"))) as client:
            facts = [client.chat_stream("Hello.") for _ in range(3)]
            for stream in facts:
                stream.reply()
                assert stream.facts is not None
                stream.facts.tokens += [1, 2]
                kept.keep(stream.facts)
        found = [kept.find(stream.facts.request_id or "") for stream in facts if stream.facts is not None]
        assert found[0] is None and all(each is not None and each.tokens == [] for each in found[1:])
        assert len(app.bodies) == 3
        kept.after_fork()
        assert kept.find(found[1].request_id or "") is None  # type: ignore[union-attr]
