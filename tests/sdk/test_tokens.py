"""Where access tokens come from: strings, callables and OAuth2, over the client's own connection settings."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from urllib.parse import parse_qs

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.transport import oauth
from parts.chat_app import ChatApp
from parts.relay import SEALED, Relay, connect, connect_async, served

TOKEN_URL = "https://issuer.example/token"
SECRET = "s3cr:et"


class Issuing:
    """A relay, and beside it a token server. answer: what the server says to its requests, by their number."""

    def __init__(self, life: float = 300.0) -> None:
        self.relay = Relay(ChatApp())
        self.relay.respond = self._respond
        self.asked: list[httpx2.Request] = []
        self.good: Callable[[str], bool] = lambda token: True
        self.life = life
        self.failure: httpx2.Response | None = None

    def _respond(self, request: httpx2.Request) -> httpx2.Response | None:
        if request.url.host == "issuer.example":
            self.asked.append(request)
            body = f'{{"access_token":"t{len(self.asked)}","token_type":"Bearer","expires_in":{self.life}}}'
            return self.failure or served(200, body.encode())
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.url.path == SEALED and not self.good(token):
            return served(401, problems.INVALID_TOKEN.body())
        return None

    @property
    def used(self) -> list[str]:
        return [request.headers["authorization"].removeprefix("Bearer ") for request in self.relay.sealed]

    def client(self, token: Any = None, **options: Any) -> lacre.Client:
        source = token or lacre.ClientCredentials(TOKEN_URL, "app", SECRET, scope="models", **options)
        return connect(self.relay, token=source)


@pytest.fixture
def issuing() -> Issuing:
    return Issuing()


def test_one_token_serves_many_calls(issuing: Issuing) -> None:
    with issuing.client() as client:
        for _ in range(3):
            client.chat("x")
    [asked] = issuing.asked
    assert issuing.used == ["t1"] * 3
    assert parse_qs(asked.content.decode()) == {"grant_type": ["client_credentials"], "scope": ["models"]}
    assert base64.b64decode(asked.headers["authorization"].removeprefix("Basic ")) == b"app:s3cr%3Aet"


def test_the_secret_in_the_form(issuing: Issuing) -> None:
    with issuing.client(in_body=True, audience="lacre") as client:
        client.chat("x")
    [asked] = issuing.asked
    expected = {"client_id": ["app"], "client_secret": [SECRET], "audience": ["lacre"]}
    assert parse_qs(asked.content.decode()).items() >= expected.items()
    assert "authorization" not in asked.headers


@pytest.mark.parametrize(("life", "used"), [(0.5, ["t1", "t2"]), (10**400, ["t1", "t1"])])
def test_replaced_before_it_expires(issuing: Issuing, life: float, used: list[str]) -> None:
    """One of 0.5 s after 0.4 s; one whose life no clock holds, never."""
    issuing.life = life
    with issuing.client() as client:
        client.chat("x")
        time.sleep(0.45)
        client.chat("x")
    assert issuing.used == used


@pytest.mark.parametrize(
    ("source", "good", "used"),
    [
        (None, "t2", ["t1", "t2"]),
        (None, "none", ["t1", "t2"]),
        (iter(["old", "new", "new", "new"]).__next__, "new", ["old", "new"]),
        ("only", "none", ["only"]),
    ],
    ids=["replaced", "once", "a callable's too", "a string is all there is"],
)
def test_a_refused_token_is_replaced_once(issuing: Issuing, source: Any, good: str, used: list[str]) -> None:
    issuing.good = lambda token: token == good
    with issuing.client(source) as client, nullcontext() if good in used else pytest.raises(lacre.Unauthenticated):
        assert client.chat("x").attempts == 2
    assert issuing.used == used


def test_single_flight(issuing: Issuing) -> None:
    with issuing.client() as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: client.chat("x"), range(8)))
    assert len(issuing.asked) == 1


async def test_single_flight_awaited(issuing: Issuing) -> None:
    source = lacre.ClientCredentials(TOKEN_URL, "app", SECRET)
    async with connect_async(issuing.relay, token=source) as client:
        await asyncio.gather(*(client.chat("x") for _ in range(8)))
        issuing.good = lambda token: token != "t1"
        await asyncio.gather(*(client.chat("x") for _ in range(8)))
    assert len(issuing.asked) == 2


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, b'{"error":"invalid_client"}', lacre.Unauthenticated),
        (400, b'{"error":"<script>"}', lacre.Unauthenticated),
        (503, b"", lacre.Unavailable),
        (200, b"<html>", lacre.InvalidMessage),
        (200, b'{"access_token":"a b"}', lacre.SettingsError),
        (200, b'{"access_token":"a","expires_in":NaN}', lacre.InvalidMessage),
    ],
)
def test_a_token_server_that_gives_none(issuing: Issuing, status: int, body: bytes, error: type[lacre.LacreError]) -> None:
    issuing.failure = served(status, body)
    with issuing.client() as client, pytest.raises(error) as caught:
        client.chat("canary")
    assert not issuing.used
    assert caught.value.remedy and "<" not in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "lasts"),
    [
        (b"3600", 3600), (b'"3600"', 3600), (b"3600.5", 3600.5), (b'"3600.5"', 3600.5), (b"0", 0), (b'"0"', 0),
        (b"null", oauth.DEFAULT_LIFE), (b"9" * 400, oauth.MAX_LIFE), (b'"9999999999"', oauth.MAX_LIFE),
        (b"1e999", oauth.MAX_LIFE), (b"-1", None), (b'"-1"', None), (b'""', None), (b'"soon"', None), (b'"1e3"', None),
        ('"\u0663"'.encode(), None), (b"true", None), (b"[]", None), (b"NaN", None), (b'"nan"', None),
        (b'"' + b"9" * 400 + b'"', None),
    ],
)  # fmt: skip
def test_how_long_a_token_lives(told: bytes, lasts: float | None) -> None:
    answer = b'{"access_token":"a","expires_in":' + told + b"}"
    if lasts is None:
        with pytest.raises(lacre.InvalidMessage, match="RFC 6749"):
            oauth.Issued.parse(200, answer, 0.0)
    else:
        early = min(oauth.EARLY, lasts * oauth.EARLY_SHARE)
        assert oauth.Issued.parse(200, answer, 0.0).replace_at == lasts - early


@pytest.mark.parametrize("url", ["http://issuer.example/token", "ftp://issuer.example", "issuer.example/token", "https://["])
def test_a_secret_goes_over_tls(url: str) -> None:
    with pytest.raises(lacre.SettingsError):
        lacre.ClientCredentials(url, "app", SECRET)
    assert SECRET not in repr(lacre.ClientCredentials("http://127.0.0.1:1/token", "app", SECRET))
    assert "t0p" not in repr(oauth.Issued("t0p", 1.0))
