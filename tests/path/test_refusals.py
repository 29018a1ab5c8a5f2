"""What the running gateway and worker refuse, and how they say it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre import problems
from lacre.exchange.call import Sealing
from lacre.exchange.request import Plain
from lacre.exchange.steps import Done, Offload, Read, Send, Step, Together
from lacre.transport.connection import outer_of
from lacre.trust.chain import ConnectionString
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.operate import dev_issuer
from parts import audited
from parts.up import Up

CHAT = b'{"model":"smollm2-135m","messages":[{"role":"user","content":"Hi."}],"max_tokens":4}'


@pytest.fixture
def gateway(up: Up) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=up.base_url, timeout=60) as client:
        yield client


class Hand:
    """Seals by hand, so that what leaves can be bent before it does."""

    def __init__(self, up: Up, gateway: httpx2.Client) -> None:
        self.sealing = Sealing(ConnectionString.parse(up.url).root, lacre.VersionMemory())
        self.gateway = gateway
        self.token = up.token
        self.gateway_key = read_ed25519(up.state / "gateway" / "grant.pem")

    def seal(self, content: bytes = CHAT, path: str = "/v1/chat/completions") -> Send:
        steps = self.sealing.exchange(Plain("POST", path, [("content-type", "application/json")], content))
        step = next(steps)
        while not (isinstance(step, Send) and step.sealed):
            step = steps.send(self._done(step))
        self.steps, self.step = steps, step
        return step

    def _done(self, step: Step) -> Done:
        match step:
            case Together():
                asked = step.do()
                with contextlib.suppress(StopIteration):
                    inner = next(asked)
                    while True:
                        inner = asked.send(self._done(inner))
            case Offload():
                step.do()
            case Send():
                response = self.gateway.request(step.method, step.path)
                self.content: bytes | None = response.content
                return outer_of(response)
            case Read():
                content, self.content = self.content, None
                return content
        return None

    def open(self, response: httpx2.Response) -> tuple[int, bytes]:
        """The status and body inside the sealed answer to what was sealed last.

        Whatever the gateway did with it, it proves that it recorded what was sent: it holds the key.
        """
        proof = audited.proof(audited.entry(dict(self.step.headers), self.step.body), self.gateway_key)
        self.steps.send(dataclasses.replace(outer_of(response), audit=proof.header()))
        with pytest.raises(StopIteration) as done:
            for data in (response.content, None):  # a short answer is all in its final chunk
                self.steps.send(data)
        opening = done.value.value
        if not opening.ended:
            opening.feed(None)
        return opening.head.status, b"".join(opening.take())

    def post(self, step: Send, **changed: str) -> httpx2.Response:
        """changed: headers that differ; an empty one is left out."""
        headers = dict(step.headers) | {"authorization": f"Bearer {self.token}"} | changed
        headers = {name: value for name, value in headers.items() if value}
        return self.gateway.request("POST", step.path, headers=headers, content=step.body)


@pytest.fixture
def hand(up: Up, gateway: httpx2.Client) -> Hand:
    return Hand(up, gateway)


def problem(response: httpx2.Response) -> problems.Problem:
    assert response.headers["content-type"] == problems.MEDIA_TYPE
    found = problems.BY_TYPE[response.json()["type"]]
    assert response.status_code == found.status
    return found


def test_sealing_by_hand_works(hand: Hand) -> None:
    assert hand.post(hand.seal()).status_code == 200


class TestTokens:
    @pytest.mark.parametrize(
        ("lifetime", "now"),
        [(60.0, time.time() - 3600), (7200.0, time.time() + 3600)],
        ids=["expired", "not yet valid"],
    )
    def test_times(self, up: Up, hand: Hand, lifetime: float, now: float) -> None:
        hand.token = dev_issuer.issue(read_ed25519(up.state / "issuer.pem"), "jo", lifetime=lifetime, now=now)
        assert problem(hand.post(hand.seal())) is problems.INVALID_TOKEN

    def test_a_foreign_audience(self, up: Up, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dev_issuer, "AUDIENCE", "another")
        hand.token = dev_issuer.issue(read_ed25519(up.state / "issuer.pem"), "jo")
        assert problem(hand.post(hand.seal())) is problems.INVALID_TOKEN

    def test_another_issuers_key(self, hand: Hand) -> None:
        hand.token = dev_issuer.issue(Ed25519PrivateKey.generate(), "jo")
        assert problem(hand.post(hand.seal())) is problems.INVALID_TOKEN

    @pytest.mark.parametrize("token", ["x", "a.b.c"])
    def test_no_token_at_all(self, hand: Hand, token: str) -> None:
        hand.token = token
        response = hand.post(hand.seal())
        assert problem(response) is problems.INVALID_TOKEN
        assert response.headers["www-authenticate"].startswith("Bearer")


class TestBodies:
    @pytest.mark.parametrize("body", [b"", b"hello", b"{}", bytes(100)])
    def test_not_chunked_ohttp(self, hand: Hand, body: bytes) -> None:
        assert problem(hand.post(dataclasses.replace(hand.seal(), body=body))) is problems.INVALID_REQUEST

    @pytest.mark.parametrize("media_type", ["application/json", "message/ohttp-req"])
    def test_another_media_type(self, hand: Hand, media_type: str) -> None:
        response = hand.post(hand.seal(), **{"content-type": media_type})
        assert problem(response) is problems.UNSUPPORTED_MEDIA_TYPE

    def test_too_large(self, hand: Hand) -> None:
        step = hand.seal()
        assert problem(hand.post(dataclasses.replace(step, body=step.body + bytes(8 * 2**20)))) is problems.TOO_LARGE

    def test_cut_short(self, hand: Hand) -> None:
        length = len(hand.seal().body)
        for size in (3, 7, 500, length - 17, length - 1):
            step = hand.seal()
            response = hand.post(dataclasses.replace(step, body=step.body[:size]))
            assert problem(response) is problems.INVALID_REQUEST, size

    def test_an_unknown_key_id(self, hand: Hand) -> None:
        step = hand.seal()
        assert problem(hand.post(dataclasses.replace(step, body=b"\xee" + step.body[1:]))) is problems.UNKNOWN_KEY

    def test_any_flipped_bit(self, hand: Hand) -> None:
        """Somewhere in the header, the key encapsulation and the chunks: never an answer."""
        places = random.Random(7)
        length = len(hand.seal().body)
        for at in [*range(8), *(places.randrange(8, length) for _ in range(24))]:
            step = hand.seal()
            body = bytearray(step.body)
            body[at] ^= 1 << places.randrange(8)
            found = problem(hand.post(dataclasses.replace(step, body=bytes(body))))
            assert found in (problems.INVALID_REQUEST, problems.UNKNOWN_KEY), at

    def test_the_same_sealed_request_twice(self, hand: Hand) -> None:
        step = hand.seal()
        assert hand.post(step).status_code == 200
        assert problem(hand.post(step)) is problems.REPLAYED


class TestInsideIsOutside:
    @pytest.mark.parametrize(("header", "value"), [("lacre-action", "complete"), ("lacre-max-tokens", "2")])
    def test_a_gateway_that_changes_what_was_asked(self, hand: Hand, header: str, value: str) -> None:
        """The gateway itself sees a 200: what was wrong is between the worker and the client."""
        response = hand.post(hand.seal(), **{header: value})
        assert response.status_code == 200
        status, body = hand.open(response)
        assert (status, json.loads(body)["error"]["code"]) == (403, "grant_mismatch")


def test_an_unknown_model_or_pool(hand: Hand) -> None:
    assert problem(hand.post(hand.seal(), **{"lacre-model": "gpt-9"})) is problems.UNKNOWN_POOL
    assert problem(hand.post(hand.seal(), **{"lacre-pool": "elsewhere"})) is problems.UNKNOWN_POOL


@pytest.mark.parametrize("header", ["lacre-pool", "lacre-model", "lacre-action", "lacre-max-tokens", "lacre-shape"])
def test_a_missing_header(hand: Hand, header: str) -> None:
    assert problem(hand.post(hand.seal(), **{header: ""})) is problems.INVALID_HEADERS


@pytest.mark.parametrize(
    ("header", "value"),
    [("lacre-action", "admin"), ("lacre-shape", "round"), ("lacre-max-tokens", "-1"), ("lacre-max-tokens", "0x10")],
)
def test_an_odd_header(hand: Hand, header: str, value: str) -> None:
    assert problem(hand.post(hand.seal(), **{header: value})) is problems.INVALID_HEADERS


class TestNoWorker:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Iterator[Up]:
        live = Up.start(tmp_path / "state")
        yield live
        live.stop()

    def test_none_live_is_503_at_once_and_busy_is_503_later(self, own: Up) -> None:
        """A worker that is stopped in its tracks stays present for 3 s; after that, nobody is."""
        worker = own.children()["lacre_backend"]
        os.kill(worker, signal.SIGSTOP)
        try:
            time.sleep(3.5)
            with lacre.Client(own.url, token=own.token, memory=lacre.VersionMemory(), retries=0) as client:
                with pytest.raises(lacre.Unavailable) as caught:
                    client.chat("Hi.")
                assert caught.value.problem == problems.NO_WORKER.type
                assert caught.value.retry_after
        finally:
            os.kill(worker, signal.SIGCONT)
