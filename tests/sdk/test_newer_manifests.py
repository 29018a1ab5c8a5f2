"""A gateway names the version of its manifest, so that running programs learn of a change before the half of a day is over."""

from __future__ import annotations

import json

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.exchange.call import POOL_PAUSE, REFRESH_PAUSE
from lacre.trust.routes import ModelRoute, RouteTarget
from parts.chat_app import ChatApp
from parts.relay import MANIFEST, Relay, clocked, connect, refusing, served

OLD = {"assistant": ModelRoute((RouteTarget("default", "tiny", 1),))}
NEW = {"assistant": ModelRoute((RouteTarget("canary", "new", 1),))}


class Program:
    """A program that runs on, with a clock of the test's."""

    def __init__(self) -> None:
        self.relay = Relay(ChatApp(), beside={"canary": Relay(ChatApp(), model="new")}, routes=OLD, version=1)
        self.now = self.relay.clock()
        self.client = clocked(self.relay, lambda: self.now)

    def ask(self, after: float = 0.0) -> tuple[str, int]:
        """The model that answered, and how often the manifest was fetched so far."""
        self.now += after
        answer = self.client.post("/chat/completions", json={"model": "assistant", "messages": [{}]})
        fetched = [request for request in self.relay.requests if request.url.path == MANIFEST]
        return json.loads(answer.content)["model"], len(fetched)

    def publish(self) -> None:
        self.relay.routes, self.relay.version = NEW, 2
        self.relay.names = self.relay.beside["canary"].names = 2


def test_the_next_call_but_one_knows_the_newer_manifest() -> None:
    program = Program()
    assert program.ask() == ("tiny", 1)
    program.publish()
    assert program.ask(REFRESH_PAUSE) == ("tiny", 1), "this answer names it"
    assert program.ask() == ("new", 2)
    assert program.ask(REFRESH_PAUSE) == ("new", 2), "the client has what the gateway names"


def test_a_pool_that_was_added_a_moment_ago() -> None:
    """A client that chose it sends nothing before it knows it, so no answer could tell it of the newer manifest."""
    program = Program()
    chosen, added = clocked(program.relay, lambda: program.now, pool="canary"), dict(program.relay.beside)
    program.relay.beside.clear()

    def asked() -> int:
        with pytest.raises(lacre.UsageError, match="the manifest has no pool 'canary'"):
            chosen.post("/chat/completions", json={"model": "new", "messages": [{}]})
        return len([request for request in program.relay.requests if request.url.path == MANIFEST])

    assert (asked(), asked()) == (1, 1), "it has just looked"
    program.now += POOL_PAUSE
    assert (asked(), asked()) == (2, 2)
    program.relay.beside.update(added)
    program.relay.version = 2
    program.now += POOL_PAUSE
    assert chosen.post("/chat/completions", json={"model": "new", "messages": [{}]}).json()["model"] == "new"


@pytest.mark.parametrize("named", [None, 1, 0])
def test_no_newer_version_no_fetch(named: int | None) -> None:
    program = Program()
    program.relay.names = named
    assert [program.ask(REFRESH_PAUSE) for _ in range(3)] == [("tiny", 1)] * 3


def test_a_gateway_that_lies_costs_a_fetch_now_and_then() -> None:
    program = Program()
    program.relay.names = 10**15 - 1
    assert [program.ask(REFRESH_PAUSE / 10)[1] for _ in range(40)][-1] == 4


@pytest.mark.parametrize("named", ["", "-1", "2.0", "two", "٢", "9" * 16, " 2,2"])
def test_a_version_that_is_none_is_ignored(named: str) -> None:
    program = Program()
    program.ask()
    answer = program.relay.answer

    async def naming(request: httpx2.Request) -> httpx2.Response:
        response = await answer(request)
        response.headers = httpx2.Headers([*response.headers.raw, (b"lacre-manifest", named.encode())])
        return response

    program.relay.answer = naming  # type: ignore[method-assign]
    assert [program.ask(REFRESH_PAUSE) for _ in range(2)] == [("tiny", 1)] * 2


def test_a_manifest_that_cannot_be_fetched_stops_no_call() -> None:
    program = Program()
    program.ask()
    program.publish()
    program.ask(REFRESH_PAUSE)
    program.relay.respond = lambda request: served(503) if request.url.path == MANIFEST else None
    assert [program.ask() for _ in range(3)] == [("tiny", 2)] * 3, "one try, and a pause"
    program.relay.respond = lambda _request: None
    assert program.ask(REFRESH_PAUSE) == ("new", 3)


def test_a_pool_that_the_gateway_no_longer_has_is_looked_up_again() -> None:
    relay = Relay(ChatApp(), beside={"canary": Relay(ChatApp(), model="new")}, routes=NEW)
    with connect(relay, retries=0) as client:
        client.chat("x", model="assistant")
        relay.beside["canary"].respond = refusing(problems.UNKNOWN_POOL)
        relay.routes, relay.version = OLD, 2
        reply = client.chat("x", model="assistant")
        assert (reply.raw["model"], reply.attempts) == ("tiny", 2)


def test_a_pool_that_the_gateway_never_has_is_an_error() -> None:
    relay = Relay(ChatApp(), beside={"canary": Relay(ChatApp(), model="new")}, routes=NEW)
    relay.beside["canary"].respond = refusing(problems.UNKNOWN_POOL)
    with connect(relay, retries=0) as client, pytest.raises(lacre.RefusedError):
        client.chat("x", model="assistant")
    assert len(relay.beside["canary"].sealed) == 2, "one fresh look, and no more"
