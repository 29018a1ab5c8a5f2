"""Tokens: the good ones make a principal, and every bad one gets the same 401 and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from lacre import problems
from lacre.errors import SettingsError
from lacre_gateway.auth import MAX_TOKEN, Authenticator, Principal, TrustedIssuer
from lacre_gateway.keyset import KeySet
from lacre_gateway.refusal import Refusal
from lacre_gateway.throttle import FailureThrottle
from parts.gateway import AUDIENCE, ISSUER, FakeWorker, Issuer, World

ALGORITHMS = ("EdDSA", "ES256", "RS256")


def authenticator(issuer: Issuer, clock: Callable[[], float] = time.time, tenant: str | None = None) -> Authenticator:
    keys = KeySet.parse(issuer.jwks(), ALGORITHMS, "issuers.0.jwks")
    trusted = TrustedIssuer(ISSUER, AUDIENCE, keys, tenant, leeway=10.0)
    return Authenticator([trusted], FailureThrottle(10_000), clock)


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


BAD: dict[str, Callable[[Issuer], str]] = {
    "expired": lambda issuer: issuer.token(exp=now() - 60),
    "not yet valid": lambda issuer: issuer.token(nbf=now() + 600),
    "issued in the future": lambda issuer: issuer.token(iat=now() + 600),
    "foreign audience": lambda issuer: issuer.token(aud="another-service"),
    "no audience": lambda issuer: issuer.token(drop="aud"),
    "no expiry": lambda issuer: issuer.token(drop="exp"),
    "no nbf": lambda issuer: issuer.token(drop="nbf"),
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
    "critical extension": lambda issuer: issuer.token(headers={"crit": ["lacre"], "lacre": 1}),
    "claims edited": edited,
    "signature cut": lambda issuer: issuer.token()[:-3],
    "no signature": lambda issuer: issuer.token().rpartition(".")[0] + ".",
    "two parts": lambda issuer: issuer.token().rpartition(".")[0],
    "not a token": lambda issuer: "open-sesame",
    "payload not an object": lambda issuer: jwt.api_jws.encode(b"[1]", issuer.ed, "EdDSA", headers={"kid": "ed"}),
    "a megabyte": lambda issuer: issuer.token(groups=["g" * 200] * 6000),
    "too many groups": lambda issuer: issuer.token(groups=[str(n) for n in range(300)]),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_token(name: str, world: World, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    token = BAD[name](world.issuer)
    body, _ = world.seal()
    response = await client.post("/v1/sealed", content=body, headers=world.headers(token))
    assert response.status_code == 401
    assert response.content == problems.INVALID_TOKEN.body()
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"] == 'Bearer realm="lacre", error="invalid_token"'
    assert worker.opened == []


@pytest.mark.parametrize("value", [None, "", "Basic YTpi", "Bearer", "Bearer ", "Bearer a b", "bearer ..", "Bearer é"])
async def test_no_token(value: str | None, world: World, client: httpx2.AsyncClient) -> None:
    body, _ = world.seal()
    headers = {**world.headers(authorization=None), **({} if value is None else {"authorization": value.encode()})}
    response = await client.post("/v1/sealed", content=body, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert json.loads(response.content)["type"] == problems.INVALID_TOKEN.type
    assert response.headers["www-authenticate"].startswith('Bearer realm="lacre"')


async def test_two_tokens_are_none(world: World, client: httpx2.AsyncClient) -> None:
    body, _ = world.seal()
    headers = [*world.headers().items(), ("authorization", f"Bearer {world.issuer.token(sub='bob')}")]
    assert (await client.post("/v1/sealed", content=body, headers=headers)).status_code == 401


@pytest.mark.parametrize("kid", ["ed", "ec", "rsa"])
def test_good_token(issuer: Issuer, kid: str) -> None:
    token = issuer.token(kid=kid, groups=["b", "a", "a"], scope="lacre:http lacre:long", plan="gold", jti="j1", exp=now() + 100)
    principal = authenticator(issuer).authenticate(f"Bearer {token}".encode(), "192.0.2.1")
    assert principal == Principal("alice", "acme", ISSUER, ("a", "b"), ("lacre:http", "lacre:long"), "gold", "j1")


def test_audience_may_be_one_of_several(issuer: Issuer) -> None:
    token = issuer.token(aud=["x", AUDIENCE])
    assert authenticator(issuer).authenticate(f"Bearer {token}".encode(), "") is not None


def test_issuer_for_one_tenant_speaks_for_no_other(issuer: Issuer) -> None:
    token = issuer.token(tenant="other")
    assert authenticator(issuer, tenant="acme").authenticate(f"Bearer {token}".encode(), "").tenant == "acme"


def test_verdict_is_kept_until_expiry_and_for_the_whole_token(issuer: Issuer) -> None:
    clock = [time.time()]
    auth = authenticator(issuer, lambda: clock[0])
    good = f"Bearer {issuer.token(exp=int(clock[0]) + 100)}".encode()
    first = auth.authenticate(good, "")
    assert auth.authenticate(good, "") is first
    # The same head and claims, another signature: the cache must not know it.
    forged = good[:-8] + bytes(reversed(good[-8:]))
    with pytest.raises(Refusal):
        auth.authenticate(forged, "")
    clock[0] += 111  # past exp and leeway: verified anew, by PyJWT's own clock still good
    assert auth.authenticate(good, "") is not first


def test_failures_are_throttled_by_address(issuer: Issuer) -> None:
    keys = KeySet.parse(issuer.jwks(), ALGORITHMS, "jwks")
    throttle = FailureThrottle(3)
    auth = Authenticator([TrustedIssuer(ISSUER, AUDIENCE, keys, None, 10.0)], throttle, time.time)
    known = f"Bearer {issuer.token(sub='known')}".encode()
    auth.authenticate(known, "192.0.2.7")

    def outcome(token: bytes, address: str) -> str:
        try:
            auth.authenticate(token, address)
        except Refusal as refusal:
            return refusal.problem.type
        return "ok"

    bad = f"Bearer {issuer.token(aud='other')}".encode()
    assert [outcome(bad, "192.0.2.7") for _ in range(4)] == [problems.INVALID_TOKEN.type] * 3 + [problems.RATE_LIMITED.type]
    assert outcome(known, "192.0.2.7") == "ok"  # a neighbour behind the same address, already known
    assert outcome(bad, "192.0.2.8") == problems.INVALID_TOKEN.type
    # One IPv6 network is one address.
    results = [outcome(bad, f"2001:db8::{n}") for n in range(4)]
    assert results[-1] == problems.RATE_LIMITED.type
    assert outcome(bad, "2001:db8:0:1::1") == problems.INVALID_TOKEN.type
    with pytest.raises(Refusal) as refused:
        auth.authenticate(bad, "192.0.2.7")
    assert refused.value.retry_after is not None and 0 < refused.value.retry_after <= 61


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


HEADERS = st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), JSON)
NAMES = ["aud", "exp", "nbf", "iat", "sub", "jti", "groups", "tenant", "scope", "plan"]


@given(headers=HEADERS, claims=st.dictionaries(st.sampled_from(["iss", *NAMES]), JSON))
def test_nothing_but_a_refusal_escapes_unsigned_claims(issuer: Issuer, headers: dict[str, Any], claims: dict[str, Any]) -> None:
    token = f"{b64({'alg': 'EdDSA', 'kid': 'ed', **headers})}.{b64({**issuer.claims(), **claims})}.AAAA"
    with pytest.raises(Refusal):
        authenticator(issuer).authenticate(f"Bearer {token}".encode(), "")


@given(claims=st.dictionaries(st.sampled_from(NAMES), JSON))
def test_nothing_but_a_refusal_escapes_signed_claims(issuer: Issuer, claims: dict[str, Any]) -> None:
    payload = json.dumps({**issuer.claims(), **claims}).encode()
    token = jwt.api_jws.encode(payload, issuer.ed, "EdDSA", headers={"kid": "ed"})
    try:
        principal = authenticator(issuer).authenticate(f"Bearer {token}".encode(), "")
    except Refusal:
        return
    assert principal.subject.isprintable() and principal.tenant.isascii()


@given(st.binary(max_size=200))
def test_nothing_but_a_refusal_escapes_bytes(issuer: Issuer, value: bytes) -> None:
    with pytest.raises(Refusal):
        authenticator(issuer).authenticate(value, "")
    with pytest.raises(Refusal):
        authenticator(issuer).authenticate(b"Bearer " + value, "")


def test_cache_is_bounded_and_long_headers_are_not_hashed(issuer: Issuer) -> None:
    with pytest.raises(Refusal):
        authenticator(issuer).authenticate(b"Bearer " + b"a" * (MAX_TOKEN + 1), "")


class TestKeySet:
    """Key sets that must not be used are refused at start, with the key to change named."""

    def refused(self, document: object, algorithms: tuple[str, ...] = ALGORITHMS) -> str:
        with pytest.raises(SettingsError) as error:
            KeySet.parse(document, algorithms, "issuers.0.jwks")
        assert str(error.value).startswith("issuers.0.jwks")
        return str(error.value)

    def jwk(self, issuer: Issuer, number: int = 0) -> dict[str, Any]:
        key: dict[str, Any] = issuer.jwks()["keys"][number]
        return key

    def test_private_key(self, issuer: Issuer) -> None:
        private = OKPAlgorithm.to_jwk(issuer.ed, as_dict=True)
        message = self.refused({"keys": [private]})
        assert "private" in message and private["d"] not in message

    def test_symmetric_key(self) -> None:
        self.refused({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]})

    def test_short_rsa_key(self) -> None:
        short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        assert "2048" in self.refused({"keys": [RSAAlgorithm.to_jwk(short.public_key(), as_dict=True)]})

    def test_two_keys_without_kid(self, issuer: Issuer) -> None:
        key = {name: value for name, value in self.jwk(issuer).items() if name != "kid"}
        self.refused({"keys": [key, self.jwk(issuer, 1)]})

    def test_two_keys_of_one_kid(self, issuer: Issuer) -> None:
        self.refused({"keys": [self.jwk(issuer), self.jwk(issuer)]})

    def test_no_key_fits(self, issuer: Issuer) -> None:
        assert "PS256" in self.refused({"keys": [self.jwk(issuer)]}, ("PS256",))

    def test_only_encryption_keys(self, issuer: Issuer) -> None:
        self.refused({"keys": [{**self.jwk(issuer), "use": "enc"}]})

    @pytest.mark.parametrize(
        "document",
        [None, [], {}, {"keys": []}, {"keys": {}}, {"keys": ["x"]}, {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "!"}]}],
    )
    def test_no_key_set(self, document: object) -> None:
        self.refused(document)

    def test_single_key_needs_no_kid(self, issuer: Issuer) -> None:
        key = {name: value for name, value in self.jwk(issuer).items() if name != "kid"}
        keys = KeySet.parse({"keys": [key]}, ALGORITHMS, "jwks")
        trusted = TrustedIssuer(ISSUER, AUDIENCE, keys, None, 10.0)
        auth = Authenticator([trusted], FailureThrottle(10), time.time)
        token = jwt.encode(issuer.claims(), issuer.ed, algorithm="EdDSA")
        assert auth.authenticate(f"Bearer {token}".encode(), "").subject == "alice"
