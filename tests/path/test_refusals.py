"""What the running gateway and worker refuse, and how they say it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre import problems
from lacre.trust.chain import ConnectionString, verify
from lacre.wire import bhttp
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.operate import dev_issuer
from parts import by_hand
from parts.bent import flipped
from parts.up import Up

CHAT = b'{"model":"smollm2-135m","messages":[{"role":"user","content":"Hi."}],"max_tokens":4}'


class Hand:
    """Seals by hand, so that what leaves can be bent before it does."""

    def __init__(self, up: Up, gateway: httpx2.Client) -> None:
        trusted = verify(gateway.get("/v1/manifest").content, ConnectionString.parse(up.url).root, time.time())
        self._config = trusted.manifest.pools["default"].keys[0].config
        self._gateway = gateway
        self.token = up.token

    def seal(self) -> by_hand.Sealed:
        dated = (("content-type", "application/json"), ("date", formatdate(usegmt=True)))
        return by_hand.seal(self._config, by_hand.request(CHAT, headers=dated))

    def post(self, body: bytes | None = None, **changed: str | None) -> httpx2.Response:
        """changed: outer headers that differ; None leaves one out."""
        headers = by_hand.outer_headers(self.token, **{"lacre-max-tokens": "4", **changed})
        return self._gateway.post("/v1/sealed", content=self.seal().body if body is None else body, headers=headers)


@pytest.fixture
def hand(up: Up) -> Iterator[Hand]:
    with httpx2.Client(base_url=up.base_url, timeout=60) as client:
        yield Hand(up, client)


def problem(response: httpx2.Response) -> problems.Problem:
    assert response.headers["content-type"] == problems.MEDIA_TYPE
    found = problems.BY_TYPE[response.json()["type"]]
    assert response.status_code == found.status
    return found


def bent(hand: Hand, change: Callable[[bytes], bytes]) -> problems.Problem:
    """What the gateway says of a sealed request whose bytes were changed."""
    return problem(hand.post(change(hand.seal().body)))


def test_sealing_by_hand_works_but_once(hand: Hand) -> None:
    sealed = hand.seal().body
    assert hand.post(sealed).status_code == 200
    assert problem(hand.post(sealed)) is problems.REPLAYED


FOREIGN = Ed25519PrivateKey.generate()


def for_another_audience(key: Ed25519PrivateKey) -> str:
    claims = jwt.decode(dev_issuer.issue(key, "jo"), options={"verify_signature": False}) | {"aud": "another"}
    return jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": dev_issuer.key_id(key), "typ": "at+jwt"})


@pytest.mark.parametrize(
    "token",
    [
        lambda key: dev_issuer.issue(key, "jo", lifetime=60, now=time.time() - 3600),
        lambda key: dev_issuer.issue(key, "jo", lifetime=7200, now=time.time() + 3600),
        for_another_audience,
        lambda _key: dev_issuer.issue(FOREIGN, "jo"),
        lambda _key: "x",
        lambda _key: "a.b.c",
    ],
    ids=["expired", "not yet valid", "foreign audience", "another issuer's key", "none", "no JSON"],
)
def test_a_token_that_is_none(up: Up, hand: Hand, token: Callable[[Ed25519PrivateKey], str]) -> None:
    hand.token = token(read_ed25519(up.state / "issuer.pem"))
    response = hand.post()
    assert problem(response) is problems.INVALID_TOKEN
    assert response.headers["www-authenticate"].startswith("Bearer")


class TestBodies:
    @pytest.mark.parametrize("body", [b"", b"hello", b"{}", bytes(100)])
    def test_not_chunked_ohttp(self, hand: Hand, body: bytes) -> None:
        assert bent(hand, lambda _sealed: body) is problems.INVALID_REQUEST

    @pytest.mark.parametrize("size", [3, 7, 500, -17, -1])
    def test_cut_short(self, hand: Hand, size: int) -> None:
        assert bent(hand, lambda sealed: sealed[:size]) is problems.INVALID_REQUEST

    def test_too_large_or_for_an_unknown_key(self, hand: Hand) -> None:
        assert bent(hand, lambda sealed: sealed + bytes(8 * 2**20)) is problems.TOO_LARGE
        assert bent(hand, lambda sealed: b"\xee" + sealed[1:]) is problems.UNKNOWN_KEY

    def test_any_flipped_bit(self, hand: Hand) -> None:
        """Somewhere in the header, the key encapsulation and the chunks: never an answer."""
        places = random.Random(7)
        length = len(hand.seal().body)
        for at in [*range(8), *(places.randrange(8, length) for _ in range(24))]:
            found = bent(hand, lambda sealed, at=at: flipped(sealed, at, places.randrange(8)))
            assert found in (problems.INVALID_REQUEST, problems.UNKNOWN_KEY), at


@pytest.mark.parametrize(("header", "value"), [("lacre-action", "complete"), ("lacre-max-tokens", "2")])
def test_a_gateway_that_changes_what_was_asked(hand: Hand, header: str, value: str) -> None:
    """The gateway itself sees a 200: what was wrong is between the worker and the client."""
    sealed = hand.seal()
    response = hand.post(sealed.body, **{header: value})
    assert response.status_code == 200
    decoder = bhttp.ResponseDecoder()
    head, *events = decoder.feed(by_hand.opened(sealed.opener, response.content)) + decoder.close()
    content = b"".join(event.content for event in events if isinstance(event, bhttp.Data))
    assert isinstance(head, bhttp.ResponseHead)
    assert (head.status, json.loads(content)["error"]["code"]) == (403, "grant_mismatch")


@pytest.mark.parametrize(
    ("header", "value", "told"),
    [
        ("content-type", "application/json", problems.UNSUPPORTED_MEDIA_TYPE),
        ("content-type", "message/ohttp-req", problems.UNSUPPORTED_MEDIA_TYPE),
        ("lacre-model", "gpt-9", problems.UNKNOWN_POOL),
        ("lacre-pool", "elsewhere", problems.UNKNOWN_POOL),
        *((f"lacre-{name}", "", problems.INVALID_HEADERS) for name in ("pool", "model", "action", "max-tokens", "shape")),
        ("lacre-action", "admin", problems.INVALID_HEADERS),
        ("lacre-shape", "round", problems.INVALID_HEADERS),
        ("lacre-max-tokens", "-1", problems.INVALID_HEADERS),
        ("lacre-max-tokens", "0x10", problems.INVALID_HEADERS),
    ],
)
def test_a_header_that_is_odd_or_missing(hand: Hand, header: str, value: str, told: problems.Problem) -> None:
    assert problem(hand.post(**{header: value or None})) is told


def test_no_live_worker_is_503_at_once(own: Up) -> None:
    """A worker that is stopped in its tracks stays present for 3 s; after that, nobody is."""
    worker = own.children()["lacre_backend"]
    os.kill(worker, signal.SIGSTOP)
    try:
        time.sleep(3.5)
        with own.client(retries=0) as client, pytest.raises(lacre.Unavailable) as caught:
            client.chat("Hi.")
        assert caught.value.problem == problems.NO_WORKER.type
        assert caught.value.retry_after
    finally:
        os.kill(worker, signal.SIGCONT)
