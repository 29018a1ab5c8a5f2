"""Attacks with access tokens, each a test: all get a 401, and no worker is asked.

Whoever made a token up learns nothing from it. The bearer of a genuine one learns which claim is not taken.
What is attacked is the whole gateway: its routes, its cache with a good token in it, its list of revocations.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
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
from lacre.problems import Problem, details
from lacre.wire.header import inspect_request
from lacre_gateway.auth import tokens
from parts.fake_worker import FakeWorker
from parts.issuer import AUDIENCE, Issuer
from parts.stage import Stage

URL = "http://127.0.0.1:8321/v1/sealed"  # the gateway's public one
PROOF_CHALLENGE = 'DPoP realm="lacre", error="invalid_dpop_proof", algs="ES256 EdDSA"'
CHALLENGE = 'Bearer realm="lacre", error="invalid_token"'


def b64(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def hs256_with_public_key(issuer: Issuer) -> str:
    """RFC 8725 section 2.1: a MAC whose secret is the public key that everybody has."""
    pem = issuer.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return mac(issuer, pem, "rsa")


def mac(issuer: Issuer, secret: bytes, kid: str) -> str:
    head = f"{b64({'alg': 'HS256', 'typ': 'JWT', 'kid': kid})}.{b64(issuer.claims())}"
    return f"{head}.{b64(hmac.digest(secret, head.encode(), hashlib.sha256))}"


def by_stranger(issuer: Issuer, **headers: Any) -> str:
    return jwt.encode(issuer.claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA", headers={"kid": "ed", **headers})


def embedded_key(issuer: Issuer) -> str:
    key = Ed25519PrivateKey.generate()
    jwk = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return jwt.encode(issuer.claims(), key, algorithm="EdDSA", headers={"kid": "ed", "jwk": jwk})


def edited(issuer: Issuer) -> str:
    head, payload, signature = issuer.token().split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    return f"{head}.{b64({**claims, 'sub': 'mallory'})}.{signature}"


def now() -> int:
    """Asked when a test runs: the suite before it may take minutes."""
    return int(time.time())


def claims_text(issuer: Issuer) -> str:
    return json.dumps(issuer.claims())


def twice(issuer: Issuer, claim: str, value: str) -> str:
    """What was meant comes last, where Python's reader looks, and once more before it, where others do."""
    return signed(issuer, json.dumps({claim: value})[:-1] + "," + claims_text(issuer)[1:])


def signed(issuer: Issuer, payload: str, header: str = '{"alg":"EdDSA","kid":"ed"}') -> str:
    """By the issuer's own key, whatever it says."""
    head = f"{b64(header.encode())}.{b64(payload.encode())}"
    return f"{head}.{b64(issuer.ed.sign(head.encode()))}"


BAD: dict[str, Callable[[Issuer], str]] = {
    "expired": lambda issuer: issuer.token(exp=now() - 60),
    "not yet valid": lambda issuer: issuer.token(nbf=now() + 600),
    "issued in the future": lambda issuer: issuer.token(iat=now() + 600),
    "foreign audience": lambda issuer: issuer.token(aud="another-service"),
    "no audience": lambda issuer: issuer.token(drop="aud"),
    "no expiry": lambda issuer: issuer.token(drop="exp"),
    "no time of issue": lambda issuer: issuer.token(drop="iat"),
    "lives longer than its issuer's may": lambda issuer: issuer.token(exp=now() + 32 * 86400),
    "no subject": lambda issuer: issuer.token(drop="sub"),
    "empty subject": lambda issuer: issuer.token(sub=""),
    "subject with a line break": lambda issuer: issuer.token(sub="alice\nroot"),
    "subject of surrogates": lambda issuer: issuer.token(sub="\ud800"),
    "long subject": lambda issuer: issuer.token(sub="a" * 257),
    "no issuer": lambda issuer: issuer.token(drop="iss"),
    "foreign issuer": lambda issuer: issuer.token(iss="https://other.example"),
    "issuer that looks alike": lambda issuer: issuer.token(iss="https://іssuer.example"),
    "tenant with a slash": lambda issuer: issuer.token(tenant="acme/evil"),
    "groups of numbers": lambda issuer: issuer.token(groups=[1, 2]),
    "no number is after exp": lambda issuer: issuer.token(exp="soon"),
    "exp beyond time": lambda issuer: issuer.token(exp=10**400),
    "exp in a string": lambda issuer: issuer.token(exp=str(now() + 600)),
    "iat in a string": lambda issuer: issuer.token(iat=str(now())),
    "subject named twice": lambda issuer: twice(issuer, "sub", "mallory"),
    "issuer named twice": lambda issuer: twice(issuer, "iss", "https://other.example"),
    "audience named twice": lambda issuer: twice(issuer, "aud", AUDIENCE),
    "a member twice deep inside": lambda issuer: signed(issuer, claims_text(issuer)[:-1] + ',"x":{"y":[{"z":1,"z":2}]}}'),
    "algorithm named twice": lambda issuer: signed(issuer, claims_text(issuer), '{"alg":"EdDSA","kid":"ed","alg":"EdDSA"}'),
    "alg none": lambda issuer: f"{b64({'alg': 'none', 'kid': 'ed'})}.{b64(issuer.claims())}.",
    "alg none, signed": lambda issuer: f"{b64({'alg': 'none', 'kid': 'ed'})}.{b64(issuer.claims())}.AAAA",
    "HS256 with the public key": hs256_with_public_key,
    "HS256 with the raw Ed25519 key": lambda issuer: mac(issuer, issuer.ed.public_key().public_bytes_raw(), "ed"),
    "algorithm that is not pinned": lambda issuer: jwt.encode(
        issuer.claims(), issuer.rsa, algorithm="RS512", headers={"kid": "rsa"}
    ),
    "algorithm of another key": lambda issuer: jwt.encode(issuer.claims(), issuer.ec, algorithm="ES256", headers={"kid": "ed"}),
    "unknown kid": lambda issuer: issuer.token(headers={"kid": "nobody"}),
    "no kid among several keys": lambda issuer: jwt.encode(issuer.claims(), issuer.ed, algorithm="EdDSA"),
    "signed by a stranger": by_stranger,
    "key embedded": embedded_key,
    "jku": lambda issuer: by_stranger(issuer, jku="https://evil.example/jwks"),
    "x5u": lambda issuer: by_stranger(issuer, x5u="https://evil.example/cert"),
    "x5c": lambda issuer: by_stranger(issuer, x5c=[base64.b64encode(bytes(300)).decode()]),
    "kid that is a path": lambda issuer: by_stranger(issuer, kid="../../../../dev/null"),
    "kid that is no string": lambda issuer: signed(issuer, claims_text(issuer), '{"alg":"EdDSA","kid":7}'),
    "critical extension that is known": lambda issuer: signed(
        issuer, claims_text(issuer), '{"alg":"EdDSA","kid":"ed","crit":["b64"],"b64":true}'
    ),
    "a DPoP proof": lambda issuer: issuer.token(headers={"typ": "dpop+jwt"}),
    "a logout token": lambda issuer: issuer.token(headers={"typ": "logout+jwt"}),
    "bound to a certificate": lambda issuer: issuer.token(cnf={"x5t#S256": "A" * 43}),
    "bound in two ways": lambda issuer: issuer.token(cnf={"jkt": "A" * 43, "x5t#S256": "A" * 43}),
    "bound to nothing": lambda issuer: issuer.token(cnf={}),
    "critical extension": lambda issuer: issuer.token(headers={"crit": ["lacre"], "lacre": 1}),
    "claims edited": edited,
    "signature cut": lambda issuer: issuer.token()[:-3],
    "no signature": lambda issuer: issuer.token().rpartition(".")[0] + ".",
    "two parts": lambda issuer: issuer.token().rpartition(".")[0],
    "not a token": lambda issuer: "open-sesame",
    "payload not an object": lambda issuer: jwt.api_jws.encode(b"[1]", issuer.ed, "EdDSA", headers={"kid": "ed"}),
    "too many groups": lambda issuer: issuer.token(groups=[str(n) for n in range(300)]),
}


UNUSABLE, INVALID = problems.UNUSABLE_CLAIMS, problems.INVALID_TOKEN
# Of those that the issuer really signed: what their bearers are told.
GENUINE: dict[str, tuple[Problem, str, str]] = {
    "expired": (INVALID, "exp", "expired"),
    "not yet valid": (INVALID, "nbf", "not-yet-valid"),
    "issued in the future": (INVALID, "iat", "not-yet-valid"),
    "foreign audience": (INVALID, "aud", "for-another-audience"),
    "no audience": (UNUSABLE, "aud", "missing"),
    "no expiry": (UNUSABLE, "exp", "missing"),
    "no time of issue": (UNUSABLE, "iat", "missing"),
    "lives longer than its issuer's may": (UNUSABLE, "exp", "lives-too-long"),
    "no subject": (UNUSABLE, "sub", "missing"),
    "empty subject": (UNUSABLE, "sub", "malformed"),
    "subject with a line break": (UNUSABLE, "sub", "malformed"),
    "subject of surrogates": (UNUSABLE, "sub", "malformed"),
    "long subject": (UNUSABLE, "sub", "malformed"),
    "tenant with a slash": (UNUSABLE, "tenant", "malformed"),
    "groups of numbers": (UNUSABLE, "groups", "malformed"),
    "too many groups": (UNUSABLE, "groups", "too-many"),
    "exp beyond time": (UNUSABLE, "exp", "malformed"),
    "exp in a string": (UNUSABLE, "exp", "malformed"),
    "iat in a string": (UNUSABLE, "iat", "malformed"),
    "bound to a certificate": (UNUSABLE, "cnf", "bound-in-another-way"),
    "bound in two ways": (UNUSABLE, "cnf", "bound-in-another-way"),
    "bound to nothing": (UNUSABLE, "cnf", "bound-in-another-way"),
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

    async def stays_shut(
        self, headers: Any, body: bytes | None = None, problem: Problem = problems.INVALID_TOKEN, challenge: str = CHALLENGE
    ) -> None:
        opened = len(self.worker.opened)
        response = await self.knock(headers, body)
        assert response.status_code == 401
        assert response.content == problem.body()
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["www-authenticate"] == challenge
        assert len(self.worker.opened) == opened

    async def says(self, headers: Any, problem: Problem, claim: str, reason: str, body: bytes | None = None) -> None:
        """It stays shut, and says why to the bearer of a genuine token."""
        opened = len(self.worker.opened)
        response = await self.knock(headers, body)
        assert (response.status_code, Problem.type_in(response.content)) == (401, problem.type)
        told = details.read(response.content)
        assert (told.get("claim", "token"), told["reason"]) == (claim, reason)
        assert f'error="invalid_token", error_description="{claim}: {reason}' in response.headers["www-authenticate"]
        assert len(self.worker.opened) == opened


@pytest.fixture
async def door(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> AsyncIterator[Door]:
    """Before and after each attack a good token is served: the attack is not refused for what is refused anyway."""
    door, good = Door(stage, worker, client), stage.headers(stage.issuer.token())
    await door.opens(good)
    yield door
    await door.opens(good)


@pytest.mark.parametrize("name", BAD)
async def test_bad_token(name: str, stage: Stage, door: Door) -> None:
    headers = stage.headers(BAD[name](stage.issuer))
    await (door.says(headers, *GENUINE[name]) if name in GENUINE else door.stays_shut(headers))


@pytest.mark.parametrize("groups", [100, 6000], ids=["a little", "a megabyte"])
async def test_a_token_that_is_too_long_says_how_long_one_may_be(groups: int, stage: Stage, door: Door) -> None:
    """Some issuers put hundreds of groups into one. It says nothing of who signed it: nobody has looked."""
    token = stage.issuer.token(groups=["g" * 200] * groups)
    opened = len(door.worker.opened)
    response = await door.knock(stage.headers(token))
    told = {"limit": "token", "unit": "bytes", "ceiling": tokens.MAX_TOKEN, "asked": len(f"Bearer {token}")}
    assert (response.status_code, response.content) == (401, problems.INVALID_TOKEN.body(told))
    assert response.headers["www-authenticate"] == CHALLENGE
    assert len(door.worker.opened) == opened


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("signed by a stranger", "signature"), ("claims edited", "signature"), ("foreign issuer", "iss: not known here"),
        ("unknown kid", "kid: not known here"), ("alg none", "authorization: not known here"), ("subject named twice", "form"),
        ("a logout token", "typ: not known here"), ("algorithm of another key", "kid: not known here"),
        ("expired", "exp: expired"), ("groups of numbers", "groups: malformed"),
    ],
)  # fmt: skip
async def test_the_log_says_why_a_token_is_not_taken(name: str, noted: str, stage: Stage, door: Door) -> None:
    """And nothing that stands in it. What is told to nobody is for the operator all the same."""
    token = BAD[name](stage.issuer)
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
    head, payload, _ = token.split(".")
    await door.stays_shut(stage.headers(f"{head}.{payload}.{b64(bytes(64))}"))


async def test_what_is_said_once_is_taken(stage: Stage, door: Door) -> None:
    """The forms above that say something twice fail for the repetition alone."""
    await door.opens(stage.headers(signed(stage.issuer, claims_text(stage.issuer))))
    await door.opens(stage.headers(signed(stage.issuer, claims_text(stage.issuer)[:-1] + ',"x":{"y":[{"z":1},{"z":2}]}}')))


async def test_the_first_characters_of_a_good_token_are_not_enough(stage: Stage, door: Door) -> None:
    good = stage.issuer.token(sub="alice")
    await door.opens(stage.headers(good))  # and its verdict is remembered
    head, payload, signature = good.split(".")
    forged = f"{head}.{b64({**stage.issuer.claims(), 'sub': 'mallory'})}.{signature}"
    assert forged[:40] == good[:40]
    await door.stays_shut(stage.headers(forged))
    await door.stays_shut(stage.headers(f"{head}.{payload}.{signature[:40]}{b64(bytes(34))}"))


class KeyServer:
    """Serves a stranger's key set, and counts who asks."""

    def __init__(self, document: dict[str, Any]) -> None:
        asked = self.asked = []  # type: ignore[var-annotated]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                content = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.mark.parametrize("parameter", ["jku", "x5u"])
async def test_no_address_in_a_token_is_visited(parameter: str, stage: Stage, door: Door) -> None:
    key = Ed25519PrivateKey.generate()
    server = KeyServer({"keys": [{**OKPAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "ed"}]})
    try:
        token = jwt.encode(stage.issuer.claims(), key, algorithm="EdDSA", headers={"kid": "ed", parameter: server.url})
        await door.stays_shut(stage.headers(token))
        assert server.asked == []
    finally:
        server.close()


# Revoked


@pytest.mark.parametrize("revoke", [{"jti": "t1"}, {"subject": "bob"}], ids=["by its id", "by its subject"])
async def test_revoked(revoke: dict[str, str], stage: Stage, door: Door) -> None:
    token = stage.issuer.token(sub="bob", jti="t1")
    await door.opens(stage.headers(token))  # and its verdict is remembered
    await stage.gateway.revoke(**revoke)
    await door.says(stage.headers(token), INVALID, "token", "revoked")
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

    def headers(self, proof: str | None, scheme: str = "DPoP", token: str | None = None) -> dict[str, str]:
        return self.stage.headers(authorization=f"{scheme} {token or self.token}", dpop=proof)


@pytest.fixture(params=["ES256", "EdDSA"])
def bound(request: pytest.FixtureRequest, stage: Stage) -> Bound:
    return Bound(stage, ProofKey.generate() if request.param == "ES256" else ProofKey(Ed25519PrivateKey.generate()))


def changed(bound: Bound, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A proof by the right key that says something else; None takes a member away."""
    head, payload, _ = bound.proof().split(".")
    parts = []
    for part, changes in ((head, header or {}), (payload, claims)):
        values = {**json.loads(base64.urlsafe_b64decode(part + "==")), **changes}
        parts.append({name: value for name, value in values.items() if value is not None})
    own, payload_bytes = parts[0].pop("alg"), json.dumps(parts[1]).encode()
    return jwt.PyJWS().encode(payload_bytes, bound.key._key, algorithm=own, headers=parts[0])


def private_jwk(key: ProofKey) -> dict[str, Any]:
    return {**key._public, "d": "AAAA"}


def proof_claims(bound: Bound) -> str:
    return base64.urlsafe_b64decode(bound.proof().split(".")[1] + "==").decode()


def proof_with(bound: Bound, payload: str) -> str:
    key = bound.key
    headers = {"typ": "dpop+jwt", "jwk": key._public}
    return jwt.PyJWS().encode(payload.encode(), key._key, algorithm=key._algorithm, headers=headers)


def unsigned(bound: Bound) -> str:
    header = {"typ": "dpop+jwt", "alg": "none", "jwk": bound.key._public}
    return f"{b64(header)}.{bound.proof().split('.')[1]}.AAAA"


def by_mac(bound: Bound) -> str:
    head = f"{b64({'typ': 'dpop+jwt', 'alg': 'HS256', 'jwk': bound.key._public})}.{bound.proof().split('.')[1]}"
    secret = json.dumps(bound.key._public).encode()
    return f"{head}.{b64(hmac.digest(secret, head.encode(), hashlib.sha256))}"


def edited_proof(bound: Bound) -> str:
    head, payload, signature = bound.proof().split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    return f"{head}.{b64({**claims, 'jti': 'another'})}.{signature}"


BAD_PROOFS: dict[str, Callable[[Bound], str | None]] = {
    "missing": lambda bound: None,
    "empty": lambda bound: "",
    "not a token": lambda bound: "open-sesame",
    "too long": lambda bound: changed(bound, padding="x" * 5000),
    "for another URL": lambda bound: bound.proof(url="https://other.example/v1/sealed"),
    "for another port": lambda bound: bound.proof(url="http://127.0.0.1:9/v1/sealed"),
    "for another path": lambda bound: bound.proof(url="http://127.0.0.1:8321/v1/manifest"),
    "over TLS": lambda bound: bound.proof(url="https://127.0.0.1:8321/v1/sealed"),
    "for no URL": lambda bound: changed(bound, htu="/v1/sealed"),
    "for another method": lambda bound: bound.proof(method="GET"),
    "by another key": lambda bound: bound.proof(key=ProofKey.generate()),
    "for another token": lambda bound: bound.proof(token=bound.stage.issuer.token()),
    "for no token": lambda bound: bound.proof(token=None),
    "for another sealed request": lambda bound: bound.proof(request=bytes(32)),
    "for no sealed request": lambda bound: bound.proof(request=None),
    "sealed request that is no text": lambda bound: changed(bound, lacre_req=7),
    "too old": lambda bound: changed(bound, iat=now() - int(WINDOW) - 5),
    "from the future": lambda bound: changed(bound, iat=now() + int(WINDOW) + 5),
    "without a time": lambda bound: changed(bound, iat=None),
    "time in a string": lambda bound: changed(bound, iat=str(now())),
    "without an id": lambda bound: changed(bound, jti=None),
    "of another type": lambda bound: changed(bound, {"typ": "JWT"}),
    "of no type": lambda bound: changed(bound, {"typ": ""}),
    "with a critical extension": lambda bound: changed(bound, {"crit": ["b64"], "b64": True}),
    "with a private key": lambda bound: changed(bound, {"jwk": private_jwk(bound.key)}),
    "without its key": lambda bound: changed(bound, {"jwk": None}),
    "with a symmetric key": lambda bound: changed(bound, {"jwk": {"kty": "oct", "k": "AAAA"}}),
    "with somebody's public key": lambda bound: changed(bound, {"jwk": ProofKey.generate()._public}),
    "alg none": unsigned,
    "signed with the public key": by_mac,
    "signature cut": lambda bound: bound.proof()[:-4],
    "claims edited": edited_proof,
    "id named twice": lambda bound: proof_with(bound, '{"jti":"a",' + proof_claims(bound)[1:]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROOFS)
async def test_bad_proof(name: str, bound: Bound, door: Door) -> None:
    await door.stays_shut(bound.headers(BAD_PROOFS[name](bound)), bound.body, problems.INVALID_PROOF, PROOF_CHALLENGE)
    await door.opens(bound.headers(bound.proof()), bound.body)


async def test_proof_replayed(bound: Bound, stage: Stage, door: Door) -> None:
    headers = bound.headers(bound.proof())
    await door.opens(headers, bound.body)
    for body in (bound.body, stage.seal()[0]):
        await door.stays_shut(headers, body, problems.INVALID_PROOF, PROOF_CHALLENGE)


async def test_request_replayed_with_a_new_proof(bound: Bound, door: Door) -> None:
    """What the holder of the key itself cannot do either: a sealed request is taken once."""
    await door.opens(bound.headers(bound.proof()), bound.body)
    response = await door.knock(bound.headers(bound.proof()), bound.body)
    assert response.content == problems.REPLAYED.body()


async def test_bound_token_as_bearer(bound: Bound, door: Door) -> None:
    for proof in (None, bound.proof()):
        headers = bound.headers(proof, scheme="Bearer")
        await door.stays_shut(headers, bound.body, problems.INVALID_PROOF, PROOF_CHALLENGE)
    await door.opens(bound.headers(bound.proof()), bound.body)


async def test_token_of_nobody_with_a_proof(bound: Bound, stage: Stage, door: Door) -> None:
    """A bearer token does not become a bound one by whoever sends it as one (RFC 9449 section 7.1)."""
    token = stage.issuer.token(sub="bob")
    await door.says(bound.headers(bound.proof(token=token), token=token), INVALID, "cnf", "missing", bound.body)


async def test_two_proofs_are_none(bound: Bound, door: Door) -> None:
    headers = [*bound.headers(bound.proof()).items(), ("dpop", bound.proof())]
    await door.stays_shut(headers, bound.body, problems.INVALID_PROOF, PROOF_CHALLENGE)


async def test_revoked_with_a_good_proof(bound: Bound, stage: Stage, door: Door) -> None:
    await door.opens(bound.headers(bound.proof()), bound.body)
    await stage.gateway.revoke(subject="bob")
    again = Bound(stage, bound.key)
    await door.says(again.headers(again.proof()), INVALID, "token", "revoked", again.body)


@pytest.mark.parametrize("url", [URL + "?x=1", URL + "#x", "HTTP://127.0.0.1:8321/v1/sealed"])
async def test_other_spellings_of_the_url_are_the_same(url: str, bound: Bound, door: Door) -> None:
    """RFC 9449 section 4.3, number 9."""
    await door.opens(bound.headers(changed(bound, htu=url)), bound.body)


async def test_the_memory_of_proofs_is_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_PROOFS", 2)
    bound, decide = Bound(stage), stage.gateway.authenticator.authenticate
    proofs = [bound.proof().encode() for _ in range(4)]
    for proof in proofs:
        await decide(f"DPoP {bound.token}".encode(), "", proof=proof, url=stage.gateway.sealed_url)
    assert len(stage.gateway.authenticator._proofs) == 2
