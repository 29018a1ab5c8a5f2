"""`lacre.legacy`: httpx's clients, sealed by the same code; what they are to a program that knows httpx alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import httpx2
import pytest

import lacre
import lacre.legacy
from lacre import problems
from parts.bent import without
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire, served

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "the sea"}]}
SEALED = "/v1/sealed"


def sync_client(relay: Relay, **options: Any) -> lacre.legacy.Client:
    return lacre.legacy.Client(relay.url, token="t0ken", memory=lacre.VersionMemory(), transport=Wire(relay), **options)


def async_client(relay: Relay) -> lacre.legacy.AsyncClient:
    return lacre.legacy.AsyncClient(relay.url, token="t0ken", memory=lacre.VersionMemory(), transport=AsyncWire(relay))


def test_a_whole_answer(relay: Relay, app: ChatApp) -> None:
    with sync_client(relay) as client:
        assert isinstance(client, httpx.Client)
        response = client.post(CHAT, json={**BODY, "user": "jo@example.com"}, headers={"cookie": "c00kie"})
        assert isinstance(response, httpx.Response)
        assert response.json()["choices"][0]["message"]["content"] == "one two three"
        assert response.extensions["lacre"].receipt.completion_tokens == 3
        assert client.verification.receipt is not None
        assert client.models() == ("tiny",)
    assert json.loads(app.bodies[0]) == {**BODY, "model": "tiny"}
    assert b"the sea" not in relay.requests[-1].content and b"c00kie" not in str(app.scopes[0]["headers"]).encode()


def test_a_stream(relay: Relay) -> None:
    with sync_client(relay) as client, client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    assert len(lines) == 4 and lines[-1] == "data: [DONE]"


async def test_async(relay: Relay) -> None:
    async with async_client(relay) as client:
        assert (await client.post(CHAT, json=BODY)).json()["model"] == "tiny"
        async with client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data:")]
        assert await client.models() == ("tiny",)
        assert client.verification.manifest is not None
    assert lines[-1] == "data: [DONE]"


def test_hooks_are_httpxs(relay: Relay) -> None:
    seen: list[object] = []
    with sync_client(relay, event_hooks={"request": [seen.append], "response": [seen.append]}) as client:
        client.post(CHAT, json=BODY)
    assert [type(each) for each in seen] == [httpx.Request, httpx.Response]


def test_timeouts_reach_the_connection(relay: Relay) -> None:
    with sync_client(relay, timeout=httpx.Timeout(9.0, read=7.0)) as client:
        client.post(CHAT, json=BODY)
        assert relay.requests[-1].extensions["timeout"]["read"] == 7.0
        client.post(CHAT, json=BODY, timeout=3.5)
        assert relay.requests[-1].extensions["timeout"]["read"] == 3.5


@pytest.mark.parametrize(
    ("fault", "error"),
    [(httpx2.ReadTimeout("slow"), httpx.TimeoutException), (httpx2.ConnectError("gone"), httpx.NetworkError)],
    ids=["timeout", "no connection"],
)
def test_network_errors_are_httpxs_and_lacres(relay: Relay, fault: Exception, error: type[Exception]) -> None:
    def fail(_request: httpx2.Request) -> httpx2.Response:
        raise fault

    relay.respond = fail
    with sync_client(relay, retries=0) as client, pytest.raises(error) as caught:
        client.post(CHAT, json=BODY)
    assert isinstance(caught.value, lacre.NetworkError)
    assert caught.value.remedy != lacre.LacreError.remedy


def test_a_refusal_is_a_response(relay: Relay) -> None:
    body = problems.FORBIDDEN.body()
    relay.respond = lambda request: served(403, body) if request.url.path == SEALED else None
    with sync_client(relay) as client:
        response = client.post(CHAT, json=BODY)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"
    assert isinstance(response.extensions["lacre.refusal"], lacre.Forbidden)


@pytest.mark.parametrize(
    ("bend", "error"),
    [(without, lacre.TruncatedStream), (lambda pieces: [*pieces, b"\0"], lacre.OpenError)],
    ids=["cut", "extended"],
)
def test_an_answer_that_proves_nothing(
    relay: Relay, bend: Callable[[list[bytes]], list[bytes]], error: type[Exception]
) -> None:
    relay.bend = bend
    with sync_client(relay) as client, pytest.raises(error):
        client.post(CHAT, json=BODY)


def test_other_destinations_are_refused(relay: Relay) -> None:
    with sync_client(relay) as client, pytest.raises(lacre.DestinationError):
        client.post("https://example.com/v1/chat/completions", json=BODY)
    assert not relay.requests


def test_redirects_are_answers(relay: Relay) -> None:
    async def elsewhere(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 307, "headers": [(b"location", b"https://lacre.invalid/x")]})
        await send({"type": "http.response.body", "body": b""})

    relay.app = elsewhere
    with sync_client(relay) as client:
        assert client.post(CHAT, json=BODY, follow_redirects=True).status_code == 307
    assert len(relay.opened) == 1


def test_environment_proxies_do_not_unseal(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with sync_client(relay) as client:
        client.post(CHAT, json=BODY)
    assert len(relay.opened) == 1
