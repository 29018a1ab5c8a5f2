"""What a client says about which requests are of one conversation: the same for its turns, and nothing else."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

import lacre
from lacre.exchange.affinity import affinity_of, beginning_of
from lacre.exchange.call import SALT_LIFETIME
from lacre.wire.outer import AFFINITY, is_affinity
from parts.chat_app import ChatApp
from parts.relay import Relay, clocked, connect, connect_async

CHAT = "/v1/chat/completions"
SYSTEM, HELLO = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}
ANSWER, NEXT = {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And now?"}
OTHER_ANSWER = {"role": "assistant", "content": "Good day."}
# The turns of one conversation, as each API has them.
FACES: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": [SYSTEM, HELLO]},
        {"messages": [SYSTEM, HELLO, ANSWER, NEXT], "max_tokens": 9, "temperature": 1.0},
        {"messages": [SYSTEM, HELLO, OTHER_ANSWER, HELLO]},
    ],
    "/v1/responses": [
        {"instructions": "Be brief.", "input": "Hello."},
        {"instructions": "Be brief.", "input": [HELLO]},
        {"instructions": "Be brief.", "input": [HELLO, ANSWER, NEXT]},
    ],
    "/v1/messages": [
        {"system": "Be brief.", "messages": [HELLO], "max_tokens": 9},
        {"system": "Be brief.", "messages": [HELLO, ANSWER, NEXT], "max_tokens": 90},
    ],
}
OTHERS: dict[str, list[dict[str, Any]]] = {
    CHAT: [{"messages": [HELLO]}, {"messages": [SYSTEM, NEXT]}, {"messages": [SYSTEM, SYSTEM, HELLO]}],
    "/v1/responses": [{"input": "Hello."}, {"instructions": "Be brief.", "input": "Hello"}],
    "/v1/messages": [{"messages": [HELLO], "max_tokens": 9}, {"system": "Be", "messages": [HELLO], "max_tokens": 9}],
}


def said(relay: Relay) -> list[str | None]:
    return [request.headers.get(AFFINITY) for request in relay.sealed]


@pytest.mark.parametrize("path", FACES)
def test_turns_and_branches_say_the_same(client: lacre.Client, relay: Relay, path: str) -> None:
    for body in (*FACES[path], *OTHERS[path]):
        client.post(path, json=body)
    first, *rest = said(relay)
    turns = len(FACES[path]) - 1
    assert is_affinity(str(first))
    assert rest[:turns] == [first] * turns
    assert len({first, *rest[turns:]}) == 1 + len(OTHERS[path])


def test_it_is_outside_the_seal_alone(client: lacre.Client, relay: Relay) -> None:
    client.chat("Hello.")
    [affinity], [opened] = said(relay), relay.opened
    assert affinity is not None
    assert affinity not in str(opened.request.headers) + opened.request.content.decode()


def test_requests_without_later_turns_have_none(client: lacre.Client, relay: Relay) -> None:
    client.post("/v1/completions", json={"prompt": "Hello."})
    client.post("/v1/embeddings", json={"input": "Hello."})
    client.post("/anything", json={"messages": [HELLO], "model": "tiny"})
    client.get("/v1/models")
    for odd in ({}, {"messages": []}, {"messages": [SYSTEM]}, {"messages": 7}, {"messages": [7]}, {"input": None}):
        client.post(CHAT, json=odd)
    assert said(relay) == [None] * len(relay.sealed)


def test_it_can_be_off(relay: Relay) -> None:
    with connect(relay, affinity=False) as off:
        off.chat("Hello.")
        off.with_options(cache_scope="ann").chat("Hello.")
    assert said(relay) == [None] * 2
    with pytest.raises(lacre.UsageError, match="affinity"):
        connect(relay, affinity="no")


async def test_an_async_client_says_it_too_and_it_can_be_off(relay: Relay) -> None:
    async with connect_async(relay, affinity=False) as off, connect_async(relay) as on:
        for client in (off, on):
            await client.chat("Hello.")
    assert [value is None for value in said(relay)] == [True, False]


def test_users_of_a_program_and_clients_say_different_things(relay: Relay) -> None:
    with connect(relay) as one, connect(relay) as other:
        for client in (one, one.with_options(cache_scope="ann"), one.with_options(cache_scope="bob"), other):
            client.chat("Hello.")
    assert len(set(said(relay))) == 4


def test_it_changes_with_the_salt(app: ChatApp) -> None:
    relay, now = Relay(app, lifetime=10 * SALT_LIFETIME), [time.time()]
    with clocked(relay, lambda: now[0]) as client:
        for later in (0.0, 1.0, SALT_LIFETIME):
            now[0] += later
            client.post("/chat/completions", json={"messages": [HELLO]})
    first, second, third = said(relay)
    salts = [opened.headers("lacre-cache-salt") for opened in relay.opened]
    assert first == second != third
    assert salts[0] == salts[1] != salts[2]


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
)


@given(some.dictionaries(some.sampled_from(["messages", "input", "instructions", "system"]), JSON))
def test_no_body_is_too_odd(body: dict[str, Any]) -> None:
    beginning = beginning_of(body)
    assert beginning is None or beginning_of(json.loads(json.dumps(body))) == beginning


@given(some.lists(some.text(), min_size=4, max_size=4), some.lists(some.text(), min_size=4, max_size=4))
def test_each_part_counts(one: list[str], other: list[str]) -> None:
    """Names of pools and models are visible ASCII, so none reaches into the next part."""
    first, second = ([re.sub(r"[^!-~]", "", text) for text in parts] for parts in (one, other))
    made = [affinity_of(salt, pool, model, text.encode()) for salt, pool, model, text in (first, second)]
    assert (made[0] == made[1]) == (first == second)
    assert all(map(is_affinity, made))
