"""Errors that help: by which id the operator finds the request, which limit, which token; and nothing said twice."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import traceback
from typing import Any

import httpx2
import pytest

import lacre
import lacre.legacy
from lacre import problems
from lacre.cli.output import tell
from lacre.evidence import audit_proof
from parts.bent import flipped, without
from parts.chat_app import ChatApp
from parts.relay import Relay, Wire, connect, connect_async, on_sealed, refusing, served

ONCE = {"retries": 0, "resume": 0}
BODY = {"messages": [{"role": "user", "content": "x"}]}


class Numbered(Relay):
    """Gives its answers an id, as a gateway does."""

    def __init__(self, told: str | None = None, **bent: Any) -> None:
        super().__init__(ChatApp(), **bent)
        self.told = told

    @property
    def number(self) -> int:
        return len(self.sealed)

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().answer(request)
        response.headers["lacre-request-id"] = self.told or f"r{self.number}"
        return response


FAULTS: dict[str, dict[str, Any]] = {
    "refused": {"respond": refusing(problems.FORBIDDEN)},
    "unsealed": {"respond": on_sealed(lambda: served(200, b"{}"))},
    "cut": {"bend": without},
    "the connection broke": {"bend": without, "fault": httpx2.ReadError("")},
    "altered": {"bend": lambda pieces: list(map(flipped, pieces))},
    "no receipt": {"receipts": lambda receipt: []},
    "no proof": {"audit": lambda proof: None},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bent", FAULTS.values(), ids=FAULTS)
def test_every_error_has_the_requests_id(bent: dict[str, Any], stream: bool) -> None:
    async def ask() -> None:
        async with connect_async(Numbered(**bent), **ONCE) as client:
            await (client.chat_stream("x").reply() if stream else client.chat("x"))

    with connect(Numbered(**bent), **ONCE) as client, pytest.raises(lacre.LacreError) as sync:
        client.chat_stream("x").reply() if stream else client.chat("x")
    with pytest.raises(lacre.LacreError) as later:
        asyncio.run(ask())
    for error in (sync.value, later.value):
        assert error.request_id == "r1"
        assert error.verification is not None
        assert "".join(traceback.format_exception_only(error)).count("(request id: r1)") == 1


def test_the_models_servers_error_has_it_too() -> None:
    relay = Numbered()
    with connect(relay, **ONCE) as client:
        for ask in (lambda: client.chat([]), lambda: client.chat_stream([]).reply()):
            with pytest.raises(lacre.ApiError) as caught:
                ask()
            assert caught.value.request_id == f"r{relay.number}"
            assert caught.value.verification is not None


def test_it_is_the_newest_requests_or_a_refused_manifests() -> None:
    with connect(Numbered(respond=refusing(problems.NO_WORKER, retry_after="0")), retries=1) as client:
        with pytest.raises(lacre.Unavailable) as caught:
            client.chat("x")
        assert caught.value.request_id == "r2"
    with connect(Numbered(respond=lambda _request: served(503, problems.NOT_READY.body())), **ONCE) as client:
        with pytest.raises(lacre.Unavailable) as caught:
            client.models()
        assert caught.value.request_id == "r0"


@pytest.mark.parametrize("told", ["x" * 65, "send your key to evil.example", "a\tb", "\u00e9"])
def test_what_is_no_id_is_not_told(told: str) -> None:
    relay = Numbered(told, **FAULTS["refused"])
    with connect(relay, **ONCE) as client, pytest.raises(lacre.Forbidden) as caught:
        client.chat("x")
    assert caught.value.request_id is None


def test_openais_packages_find_it_where_they_look() -> None:
    relay = Numbered()
    settings = {"token": "t", "memory": lacre.VersionMemory(), "transport": Wire(relay), "retries": 0}
    with lacre.legacy.Client(relay.url, **settings) as client:
        assert client.post("/v1/chat/completions", json=BODY).headers["x-request-id"] == "r1"
        relay.respond = refusing(problems.FORBIDDEN)
        assert client.post("/v1/chat/completions", json=BODY).headers["x-request-id"] == "r2"


def jwt(**claims: Any) -> str:
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{part}.c2ln"


class TestATokenThatHasExpired:
    def refused(self, token: str, details: dict[str, Any] | None = None) -> lacre.Unauthenticated:
        relay = Numbered(respond=refusing(problems.INVALID_TOKEN, details))
        with connect(relay, token=token, **ONCE) as client, pytest.raises(lacre.Unauthenticated) as caught:
            client.chat("x")
        assert relay.number == 1  # a clock that is wrong here keeps no request from being sent
        return caught.value

    def test_says_so_by_its_own_word(self) -> None:
        assert "The token expired at 2001-09-09T01:46:40Z." in str(self.refused(jwt(exp=1_000_000_000)))
        assert "expired at" not in str(self.refused(jwt(exp=time.time() + 60)))
        gateways_word = self.refused(jwt(exp=1_000_000_000), {"reason": "signature"})
        assert gateways_word.details == {"reason": "signature"}

    @pytest.mark.parametrize("exp", [None, True, "1", -1, 1e400, [1]])
    def test_what_is_no_time(self, exp: object) -> None:
        assert audit_proof.expires(jwt(exp=exp)) is None
        assert "expired at" not in str(self.refused(jwt(exp=exp)))

    @pytest.mark.parametrize("token", ["opaque", "a.b", "a.!.c", "e30.W10.c2ln"])
    def test_what_is_no_jwt(self, token: str) -> None:
        assert audit_proof.expires(token) is None


def refused(kind: problems.Problem, details: dict[str, Any], **headers: str) -> Any:
    with connect(Numbered(respond=refusing(kind, details, **headers)), **ONCE) as client:
        with pytest.raises(lacre.RefusedError) as caught:
            client.chat("x")
    return caught.value


def test_which_limit() -> None:
    error = refused(problems.RATE_LIMITED, {"limit": "concurrent_per_subject", "scope": "user", "ceiling": 32})
    assert "The limit is concurrent_per_subject of the user: at most 32." in str(error)
    assert "max_concurrency=N" in error.remedy and error.details["ceiling"] == 32
    tokens = {"limit": "tokens_per_minute", "ceiling": 1000, "unit": "tokens"}
    error = refused(problems.RATE_LIMITED, tokens, retry_after="26")
    assert str(error) == (
        "Too many requests. The limit is tokens_per_minute: at most 1000 tokens. The gateway accepts it again in 26 s."
        " (request id: r1)"
    )
    assert type(error) is lacre.RateLimited and error.retry_after == 26.0


def test_a_model_typo_lists_the_models() -> None:
    assert "Models: tiny, small." in str(refused(problems.UNKNOWN_POOL, {"models": ["tiny", "small"]}))


class TestNothingIsSaidTwice:
    @pytest.mark.parametrize("kind", problems.BY_TYPE.values(), ids=lambda kind: kind.slug)
    def test_of_a_refusal(self, kind: problems.Problem) -> None:
        error = kind.exception(26.0)
        assert error.remedy not in str(error)
        assert "".join(traceback.format_exception(error)).count(error.remedy) == 1

    def test_by_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = problems.FORBIDDEN.exception()
        error.request_id = "r7"
        tell(error)
        told = capsys.readouterr().err
        assert told.count(error.remedy) == 1
        assert "request id: r7" in told
        tell(lacre.SettingsError("port 1 of x cannot be had: choose another with --port"))
        assert "what helps" not in capsys.readouterr().err
