"""Attacks with access tokens, each a test: all get a 401, and no worker is asked.

Whoever made a token up learns nothing from it. The bearer of a genuine one learns which claim is not taken: `token_shapes`
has all of those. What is attacked here is the whole gateway: its routes, its cache with a good token in it, its list of
revocations.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import OKPAlgorithm

from lacre import ProofKey, problems
from lacre.jose.dpop import WINDOW
from lacre.jose.jws import b64u
from lacre.problems import INVALID_PROOF, INVALID_TOKEN, Problem, details
from lacre.wire.header import inspect_request
from lacre_gateway.auth import tokens
from parts.fake_worker import FakeWorker
from parts.issuer import AUDIENCE, Issuer
from parts.stage import Stage

URL = "http://127.0.0.1:8321/v1/sealed"  # the gateway's public one
PROOF_CHALLENGE = 'DPoP realm="lacre", error="invalid_dpop_proof", algs="ES256 EdDSA"'
CHALLENGE = 'Bearer realm="lacre", error="invalid_token"'

Changes = Mapping[str, Any] | str
Sign = Callable[[bytes], bytes]
NONE: Changes = {}


def now() -> int:
    """Asked when a test runs: the suite before it may take minutes."""
    return int(time.time())


def part(token: str, number: int) -> dict[str, Any]:
    """Its header or its claims."""
    members: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token.split(".")[number] + "=="))
    return members


def rewritten(token: str, number: int, changes: Changes) -> str:
    if isinstance(changes, str):
        return b64u(changes.encode())
    members = {**part(token, number), **changes}
    return b64u(json.dumps({name: value for name, value in members.items() if value is not None}).encode())


def altered(token: str, header: Changes = NONE, claims: Changes = NONE, sign: Sign | None = None) -> str:
    """The token with other members, of which None takes one away, or other text; signed anew, or with the signature it had."""
    head, payload, signature = token.split(".")
    said = f"{rewritten(token, 0, header) if header else head}.{rewritten(token, 1, claims) if claims else payload}"
    return f"{said}.{b64u(sign(said.encode())) if sign else signature}"


def macked(token: str, secret: bytes, **header: Any) -> str:
    """RFC 8725 section 2.1: a MAC whose secret is the public key that everybody has."""
    return altered(token, {"alg": "HS256", **header}, sign=lambda said: hmac.digest(secret, said, hashlib.sha256))


def pem(issuer: Issuer) -> bytes:
    return issuer.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def by_stranger(issuer: Issuer, **headers: Any) -> str:
    return altered(issuer.token(), headers, sign=Ed25519PrivateKey.generate().sign)


def signed(issuer: Issuer, header: Changes = NONE, claims: Changes = NONE) -> str:
    """By the issuer's own key, whatever it says."""
    return altered(issuer.token(), header, claims, issuer.ed.sign)


def twice(issuer: Issuer, claim: str, value: str) -> str:
    """What was meant comes last, where Python's reader looks, and once more before it, where others do."""
    return signed(issuer, NONE, json.dumps({claim: value})[:-1] + "," + json.dumps(issuer.claims())[1:])


def deep(issuer: Issuer, inside: str) -> str:
    return signed(issuer, NONE, json.dumps(issuer.claims())[:-1] + f',"x":{{"y":[{inside}]}}}}')


def embedded_key(issuer: Issuer) -> str:
    key = Ed25519PrivateKey.generate()
    return altered(issuer.token(), {"jwk": OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)}, sign=key.sign)


BAD: dict[str, Callable[[Issuer], str]] = {
    "subject named twice": lambda issuer: twice(issuer, "sub", "mallory"),
    "issuer named twice": lambda issuer: twice(issuer, "iss", "https://other.example"),
    "audience named twice": lambda issuer: twice(issuer, "aud", AUDIENCE),
    "a member twice deep inside": lambda issuer: deep(issuer, '{"z":1,"z":2}'),
    "algorithm named twice": lambda issuer: signed(issuer, '{"alg":"EdDSA","kid":"ed","alg":"EdDSA"}'),
    "alg none": lambda issuer: altered(issuer.token(), {"alg": "none"}, sign=lambda _: b""),
    "alg none, signed": lambda issuer: altered(issuer.token(), {"alg": "none"}, sign=lambda _: bytes(3)),
    "HS256 with the public key": lambda issuer: macked(issuer.token(), pem(issuer), kid="rsa"),
    "HS256 with the raw Ed25519 key": lambda issuer: macked(issuer.token(), issuer.ed.public_key().public_bytes_raw()),
    "algorithm that is not pinned": lambda issuer: jwt.encode(issuer.claims(), issuer.rsa, "RS512", {"kid": "rsa"}),
    "algorithm of another key": lambda issuer: jwt.encode(issuer.claims(), issuer.ec, "ES256", {"kid": "ed"}),
    "unknown kid": lambda issuer: issuer.token(headers={"kid": "nobody"}),
    "no kid among several keys": lambda issuer: jwt.encode(issuer.claims(), issuer.ed, "EdDSA"),
    "signed by a stranger": by_stranger,
    "key embedded": embedded_key,
    "x5c": lambda issuer: by_stranger(issuer, x5c=[base64.b64encode(bytes(300)).decode()]),
    "kid that is a path": lambda issuer: by_stranger(issuer, kid="../../../../dev/null"),
    "kid that is no string": lambda issuer: signed(issuer, {"kid": 7}),
    "critical extension that is known": lambda issuer: signed(issuer, {"crit": ["b64"], "b64": True}),
    "critical extension": lambda issuer: signed(issuer, {"crit": ["lacre"], "lacre": 1}),
    "a logout token": lambda issuer: issuer.token(headers={"typ": "logout+jwt"}),
    "foreign issuer": lambda issuer: issuer.token(iss="https://other.example"),
    "claims edited": lambda issuer: altered(issuer.token(), claims={"sub": "mallory"}),
    "signature cut": lambda issuer: issuer.token()[:-3],
    "no signature": lambda issuer: issuer.token().rpartition(".")[0] + ".",
    "two parts": lambda issuer: issuer.token().rpartition(".")[0],
    "not a token": lambda issuer: "open-sesame",
    "payload not an object": lambda issuer: signed(issuer, NONE, "[1]"),
}
# Signed by the issuer, and refused for what stands in them: what their bearers are told.
GENUINE: dict[str, tuple[Callable[[Issuer], str], Problem, str, str]] = {
    "expired": (lambda issuer: issuer.token(exp=now() - 60), INVALID_TOKEN, "exp", "expired"),
    "foreign audience": (lambda issuer: issuer.token(aud="x"), INVALID_TOKEN, "aud", "for-another-audience"),
    "no subject": (lambda issuer: issuer.token(drop="sub"), problems.UNUSABLE_CLAIMS, "sub", "missing"),
    "groups of numbers": (lambda issuer: issuer.token(groups=[1]), problems.UNUSABLE_CLAIMS, "groups", "malformed"),
}


@dataclass
class Door:
    """The gateway's, with a worker behind it that counts."""

    stage: Stage
    worker: FakeWorker
    client: httpx2.AsyncClient

    async def knock(self, headers: Any, body: bytes | None = None) -> httpx2.Response:
        return await self.client.post("/v1/sealed", content=body or self.stage.seal()[0], headers=headers)

    async def opens(self, headers: Any, body: bytes | None = None) -> None:
        assert (await self.knock(headers, body)).status_code == 200

    async def refuses(self, headers: Any, body: bytes | None = None) -> httpx2.Response:
        opened = len(self.worker.opened)
        response = await self.knock(headers, body)
        assert (response.status_code, response.headers["content-type"]) == (401, "application/problem+json")
        assert len(self.worker.opened) == opened
        return response

    async def stays_shut(
        self, headers: Any, body: bytes | None = None, problem: Problem = INVALID_TOKEN, challenge: str = CHALLENGE, **told: Any
    ) -> None:
        response = await self.refuses(headers, body)
        told["request_id"] = response.headers["lacre-request-id"]
        assert (response.content, response.headers["www-authenticate"]) == (problem.body(told), challenge)

    async def takes_no_proof(self, headers: Any, body: bytes | None = None) -> None:
        await self.stays_shut(headers, body, INVALID_PROOF, PROOF_CHALLENGE)

    async def says(self, headers: Any, problem: Problem, claim: str, reason: str, body: bytes | None = None) -> None:
        """It stays shut, and says why to the bearer of a genuine token."""
        response = await self.refuses(headers, body)
        told = details.read(response.content)
        assert (Problem.type_in(response.content), told.get("claim", "token"), told["reason"]) == (problem.type, claim, reason)
        assert f'error="invalid_token", error_description="{claim}: {reason}' in response.headers["www-authenticate"]


@pytest.fixture
async def door(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> AsyncIterator[Door]:
    """Before and after each attack a good token is served: the attack is not refused for what is refused anyway."""
    door, good = Door(stage, worker, client), stage.headers(stage.issuer.token())
    await door.opens(good)
    yield door
    await door.opens(good)


@pytest.mark.parametrize("name", BAD)
async def test_bad_token(name: str, stage: Stage, door: Door) -> None:
    await door.stays_shut(stage.headers(BAD[name](stage.issuer)))


@pytest.mark.parametrize("name", GENUINE)
async def test_genuine_token(name: str, stage: Stage, door: Door) -> None:
    token, *told = GENUINE[name]
    await door.says(stage.headers(token(stage.issuer)), *told)


@pytest.mark.parametrize("groups", [100, 200], ids=["a little", "nearly a whole head"])
async def test_a_token_that_is_too_long_says_how_long_one_may_be(groups: int, stage: Stage, door: Door) -> None:
    """Some issuers put hundreds of groups into one. It says nothing of who signed it: nobody looked. Longer heads get a 431."""
    token = stage.issuer.token(groups=["g" * 200] * groups)
    asked = len(f"Bearer {token}")
    await door.stays_shut(stage.headers(token), limit="token", unit="bytes", ceiling=tokens.MAX_TOKEN, asked=asked)


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("signed by a stranger", "signature: not by this issuer's key"), ("foreign issuer", "iss: not in the settings"),
        ("claims edited", "signature: not by this issuer's key"), ("unknown kid", "kid: not among this issuer's keys"),
        ("alg none", "authorization: not a JWT"), ("critical extension", "crit: not understood"),
        ("subject named twice", "form: not two JSON objects and a signature, or a member appears twice"),
        ("a logout token", "typ: not an access token"), ("algorithm of another key", "kid: not among this issuer's keys"),
        ("algorithm that is not pinned", "alg: not among this issuer's algorithms"),
        ("expired", "exp: expired"), ("groups of numbers", "groups: malformed"),
    ],
)  # fmt: skip
async def test_the_log_says_why_a_token_is_not_taken(name: str, noted: str, stage: Stage, door: Door) -> None:
    """And nothing that stands in it. What is told to nobody is for the operator all the same."""
    token = (BAD[name] if name in BAD else GENUINE[name][0])(stage.issuer)
    await door.knock(stage.headers(token))
    line = stage.logged()[-1]
    assert (line["status"], line["reason"]) == (401, noted)
    assert token[-20:] not in stage.log.getvalue()


async def test_an_expired_token_says_when_to_whom_the_issuer_gave_it_alone(stage: Stage, door: Door) -> None:
    ended = now() - 3600
    token = stage.issuer.token(exp=ended)
    response = await door.knock(stage.headers(token))
    assert details.read(response.content)["expired_at"] == ended
    said = f"exp: expired at {datetime.datetime.fromtimestamp(ended, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    assert response.headers["www-authenticate"] == f'{CHALLENGE}, error_description="{said}"'
    await door.stays_shut(stage.headers(altered(token, sign=lambda _: bytes(64))))


async def test_what_is_said_once_is_taken(stage: Stage, door: Door) -> None:
    """The forms above that say something twice fail for the repetition alone."""
    for token in (signed(stage.issuer), deep(stage.issuer, '{"z":1},{"z":2}')):
        await door.opens(stage.headers(token))


async def test_the_first_characters_of_a_good_token_are_not_enough(stage: Stage, door: Door) -> None:
    good = stage.issuer.token(sub="alice")
    await door.opens(stage.headers(good))  # and its verdict is remembered
    forged = altered(good, claims={"sub": "mallory"})
    assert forged[:40] == good[:40]
    signature = good.rpartition(".")[2]
    for token in (forged, good.replace(signature, signature[:40] + b64u(bytes(34)))):
        await door.stays_shut(stage.headers(token))


@pytest.mark.parametrize("parameter", ["jku", "x5u"])
async def test_no_address_in_a_token_is_visited(parameter: str, stage: Stage, door: Door) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        url = f"http://127.0.0.1:{stranger.getsockname()[1]}/"
        await door.stays_shut(stage.headers(by_stranger(stage.issuer, **{parameter: url})))
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has come
            stranger.accept()


@pytest.mark.parametrize("revoke", [{"jti": "t1"}, {"subject": "bob"}], ids=["by its id", "by its subject"])
async def test_revoked(revoke: dict[str, str], stage: Stage, door: Door) -> None:
    token = stage.issuer.token(sub="bob", jti="t1")
    await door.opens(stage.headers(token))  # and its verdict is remembered
    await stage.gateway.revoke(**revoke)
    await door.says(stage.headers(token), INVALID_TOKEN, "token", "revoked")
    await door.opens(stage.headers(stage.issuer.token(sub="carol", jti="t2")))


# Bound to a key


@dataclass
class Bound:
    """A token that is bound to a key, and a sealed request with its proof."""

    stage: Stage
    key: ProofKey = field(default_factory=ProofKey.generate)

    def __post_init__(self) -> None:
        self.token = self.stage.issuer.token(sub="bob", cnf={"jkt": self.key.thumbprint})
        self.body = self.stage.seal()[0]
        self.digest = inspect_request(self.body).digest

    def proof(self, method: str = "POST", url: str = URL, **changes: Any) -> str:
        values = {"token": self.token, "request": self.digest, **changes}
        return values.pop("key", self.key).proof(method, url, **values)

    def changed(self, header: Changes = NONE, claims: Changes = NONE) -> str:
        """A proof by the right key that says something else."""
        algorithm = jwt.get_algorithm_by_name(self.key._algorithm)
        return altered(self.proof(), header, claims, lambda said: algorithm.sign(said, self.key._key))

    def headers(self, proof: str | None, scheme: str = "DPoP", token: str | None = None) -> dict[str, str]:
        return self.stage.headers(authorization=f"{scheme} {token or self.token}", dpop=proof)


@pytest.fixture(params=["ES256", "EdDSA"])
def bound(request: pytest.FixtureRequest, stage: Stage) -> Bound:
    return Bound(stage, ProofKey.generate() if request.param == "ES256" else ProofKey(Ed25519PrivateKey.generate()))


BAD_PROOFS: dict[str, Callable[[Bound], str | None]] = {
    "missing": lambda bound: None,
    "empty": lambda bound: "",
    "not a token": lambda bound: "open-sesame",
    "too long": lambda bound: bound.changed(NONE, {"padding": "x" * 5000}),
    "for another URL": lambda bound: bound.proof(url="https://other.example/v1/sealed"),
    "for another port": lambda bound: bound.proof(url="http://127.0.0.1:9/v1/sealed"),
    "for another path": lambda bound: bound.proof(url="http://127.0.0.1:8321/v1/manifest"),
    "over TLS": lambda bound: bound.proof(url="https://127.0.0.1:8321/v1/sealed"),
    "for no URL": lambda bound: bound.changed(NONE, {"htu": "/v1/sealed"}),
    "for another method": lambda bound: bound.proof(method="GET"),
    "by another key": lambda bound: bound.proof(key=ProofKey.generate()),
    "for another token": lambda bound: bound.proof(token=bound.stage.issuer.token()),
    "for no token": lambda bound: bound.proof(token=None),
    "for another sealed request": lambda bound: bound.proof(request=bytes(32)),
    "for no sealed request": lambda bound: bound.proof(request=None),
    "sealed request that is no text": lambda bound: bound.changed(NONE, {"lacre_req": 7}),
    "too old": lambda bound: bound.changed(NONE, {"iat": now() - int(WINDOW) - 5}),
    "from the future": lambda bound: bound.changed(NONE, {"iat": now() + int(WINDOW) + 5}),
    "without a time": lambda bound: bound.changed(NONE, {"iat": None}),
    "time in a string": lambda bound: bound.changed(NONE, {"iat": str(now())}),
    "without an id": lambda bound: bound.changed(NONE, {"jti": None}),
    "of another type": lambda bound: bound.changed({"typ": "JWT"}),
    "of no type": lambda bound: bound.changed({"typ": ""}),
    "with a critical extension": lambda bound: bound.changed({"crit": ["b64"], "b64": True}),
    "with a private key": lambda bound: bound.changed({"jwk": {**bound.key._public, "d": "AAAA"}}),
    "without its key": lambda bound: bound.changed({"jwk": None}),
    "with a symmetric key": lambda bound: bound.changed({"jwk": {"kty": "oct", "k": "AAAA"}}),
    "with somebody's public key": lambda bound: bound.changed({"jwk": ProofKey.generate()._public}),
    "alg none": lambda bound: altered(bound.proof(), {"alg": "none"}, sign=lambda _: bytes(3)),
    "signed with the public key": lambda bound: macked(bound.proof(), json.dumps(bound.key._public).encode()),
    "signature cut": lambda bound: bound.proof()[:-4],
    "claims edited": lambda bound: altered(bound.proof(), claims={"jti": "another"}),
    "id named twice": lambda bound: bound.changed(NONE, '{"jti":"a",' + json.dumps(part(bound.proof(), 1))[1:]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROOFS)
async def test_bad_proof(name: str, bound: Bound, door: Door) -> None:
    await door.takes_no_proof(bound.headers(BAD_PROOFS[name](bound)), bound.body)
    await door.opens(bound.headers(bound.proof()), bound.body)


async def test_replayed(bound: Bound, stage: Stage, door: Door) -> None:
    headers = bound.headers(bound.proof())
    await door.opens(headers, bound.body)
    for body in (bound.body, stage.seal()[0]):
        await door.takes_no_proof(headers, body)
    # What the holder of the key itself cannot do either: a sealed request is taken once.
    response = await door.knock(bound.headers(bound.proof()), bound.body)
    assert Problem.type_in(response.content) == problems.REPLAYED.type


async def test_bound_token_as_bearer(bound: Bound, door: Door) -> None:
    for proof in (None, bound.proof()):
        await door.takes_no_proof(bound.headers(proof, scheme="Bearer"), bound.body)
    await door.opens(bound.headers(bound.proof()), bound.body)


async def test_token_of_nobody_with_a_proof(bound: Bound, stage: Stage, door: Door) -> None:
    """A bearer token does not become a bound one by whoever sends it as one (RFC 9449 section 7.1)."""
    token = stage.issuer.token(sub="bob")
    await door.says(bound.headers(bound.proof(token=token), token=token), INVALID_TOKEN, "cnf", "missing", bound.body)


async def test_two_proofs_are_none(bound: Bound, door: Door) -> None:
    await door.takes_no_proof([*bound.headers(bound.proof()).items(), ("dpop", bound.proof())], bound.body)


async def test_revoked_with_a_good_proof(bound: Bound, stage: Stage, door: Door) -> None:
    await door.opens(bound.headers(bound.proof()), bound.body)
    await stage.gateway.revoke(subject="bob")
    again = Bound(stage, bound.key)
    await door.says(again.headers(again.proof()), INVALID_TOKEN, "token", "revoked", again.body)


@pytest.mark.parametrize("url", [URL + "?x=1", URL + "#x", "HTTP://127.0.0.1:8321/v1/sealed"])
async def test_other_spellings_of_the_url_are_the_same(url: str, bound: Bound, door: Door) -> None:
    """RFC 9449 section 4.3, number 9."""
    await door.opens(bound.headers(bound.changed(NONE, {"htu": url})), bound.body)


async def test_the_memory_of_proofs_is_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_PROOFS", 2)
    bound, decide = Bound(stage), stage.gateway.authenticator.authenticate
    for _ in range(4):
        await decide(f"DPoP {bound.token}".encode(), "", proof=bound.proof().encode(), url=stage.gateway.sealed_url)
    assert len(stage.gateway.authenticator._proofs) == 2
