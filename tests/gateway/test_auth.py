"""Tokens: the good ones make a principal. What is done to them: `test_token_attacks`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from lacre import problems
from lacre.errors import SettingsError
from lacre_fabric.logs import make_log
from lacre_gateway.auth.claims import BadClaim, ClaimNames, is_name
from lacre_gateway.auth.jwks import KeySet
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import MAX_VERIFYING, FailureThrottle
from lacre_gateway.auth.tokens import MAX_TOKEN, Authenticator, Principal, TrustedIssuer
from lacre_gateway.http.refusal import Refusal
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage

ALGORITHMS = ("EdDSA", "ES256", "RS256")


def trusted(issuer: Issuer, tenant: str | None = None, **changes: Any) -> TrustedIssuer:
    standard: dict[str, Any] = {
        "keys": KeySet.parse(issuer.jwks(), ALGORITHMS, "issuers.0.jwks"), "algorithms": ALGORITHMS, "tenant": tenant,
        "leeway": 10.0, "lifetime": 3600.0, "names": ClaimNames(),
    }  # fmt: skip
    return TrustedIssuer(ISSUER, AUDIENCE, **{**standard, **changes})


def authenticator(
    issuer: Issuer,
    clock: Callable[[], float] = time.time,
    throttle: int = 10_000,
    others: Sequence[TrustedIssuer] = (),
    **changes: Any,
) -> Authenticator:
    revocations = RevocationList(make_log(io.StringIO()))
    asyncio.run(revocations.refresh(MemoryFabric().gateway()))
    return Authenticator([trusted(issuer, **changes), *others], revocations, FailureThrottle(throttle), clock)


def principal(auth: Authenticator, said: str | bytes, address: str = "192.0.2.1") -> Principal:
    """said: a token, or the whole header."""
    authorization = said if isinstance(said, bytes) else f"Bearer {said}".encode()
    return asyncio.run(auth.authenticate(authorization, address)).principal


def refused(auth: Authenticator, said: str | bytes, address: str = "192.0.2.1") -> Refusal:
    with pytest.raises(Refusal) as caught:
        principal(auth, said, address)
    return caught.value


def b64(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("value", ["", "Basic YTpi", "Bearer", "Bearer ", "Bearer a b", "bearer ..", "Bearer é", None, "two"])
async def test_no_token(value: str | None, stage: Stage, client: httpx2.AsyncClient) -> None:
    two = [f"Bearer {stage.issuer.token(sub=sub)}" for sub in ("alice", "bob")]
    said = two if value == "two" else [] if value is None else [value]
    headers = [*stage.headers(authorization=None).items(), *(("authorization", one.encode()) for one in said)]
    response = await client.post("/v1/sealed", content=stage.seal()[0], headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert json.loads(response.content)["type"] == problems.INVALID_TOKEN.type
    assert response.headers["www-authenticate"].startswith('Bearer realm="lacre"')


@pytest.mark.parametrize("kid", ["ed", "ec", "rsa"])
def test_good_token(issuer: Issuer, kid: str) -> None:
    """Its audience may be one of several. An issuer of one tenant speaks for no other."""
    said = {"groups": ["b", "a", "a"], "scope": "lacre:http lacre:long", "plan": "gold", "jti": "j1", "aud": ["x", AUDIENCE]}
    expected = Principal("alice", "acme", ISSUER, ("a", "b"), ("lacre:http", "lacre:long"), "gold", "j1")
    assert principal(authenticator(issuer), issuer.token(kid=kid, **said)) == expected
    assert principal(authenticator(issuer, tenant="acme"), issuer.token(kid=kid, tenant="other", **said)) == expected


def test_verdict_is_kept_until_expiry_and_for_the_whole_token(issuer: Issuer) -> None:
    clock = [time.time()]
    auth = authenticator(issuer, lambda: clock[0])
    good = issuer.token(exp=int(clock[0]) + 100)
    first = principal(auth, good)
    assert principal(auth, good) is first
    # The same head and claims, another signature: the cache must not know it.
    refused(auth, good[:-8] + good[:-9:-1])
    clock[0] += 111  # past exp and leeway: verified anew, by PyJWT's own clock still good
    assert principal(auth, good) is not first


def test_each_issuer_s_tokens_are_held_against_its_own_keys_and_rules(issuer: Issuer) -> None:
    """Both have a key of the same name; the second may sign with one algorithm, for one tenant, and says groups elsewhere."""
    other, name = Issuer(), "https://other.example"
    keys = KeySet.parse(other.jwks(), ("ES256",), "issuers.1.jwks")
    names = ClaimNames(groups=("realm_access", "roles"))
    second = TrustedIssuer(name, "another", keys, ("ES256",), "theirs", 10.0, 3600.0, names)
    auth = authenticator(issuer, others=[second])
    said = {"iss": name, "aud": "another", "realm_access": {"roles": ["staff"]}}
    assert principal(auth, issuer.token()).issuer == ISSUER
    assert principal(auth, other.token(kid="ec", **said)) == Principal("alice", "theirs", name, ("staff",))
    refused(auth, other.token(kid="ec"))  # by one, in the name of the other
    refused(auth, issuer.token(kid="ec", **said))
    refused(auth, other.token(kid="ed", **said))  # by an algorithm that is pinned for the other alone
    refused(auth, other.token(kid="ec", **{**said, "aud": AUDIENCE}))
    refused(auth, issuer.token(aud="another"))


def test_a_verdict_does_not_outlive_its_issuer_s_keys(issuer: Issuer) -> None:
    keys = AskedKeys.parse(issuer.jwks(), ALGORITHMS, "issuers.0.jwks")
    auth, token = authenticator(issuer, keys=keys), issuer.token()
    first = principal(auth, token)
    assert principal(auth, token) is first
    keys.epoch += 1
    assert principal(auth, token) is not first  # verified anew: the key that signed it is still there
    keys.epoch += 1
    keys._keys = {}
    keys.answered.set()
    refused(auth, token)


class AskedKeys(KeySet):
    """Keys that can leave, of an issuer that takes its time to say that there are no others. waiting: tokens for it."""

    epoch = 0  # type: ignore[misc]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting = 0
        self.answered = asyncio.Event()

    async def seek(self, _kid: object, _alg: object) -> None:
        self.waiting += 1
        await self.answered.wait()


def test_one_address_does_not_hold_all_places_of_tokens_that_wait_for_their_issuer(issuer: Issuer) -> None:
    """Key ids can be made up without end. Whoever has a token of a new key waits for the issuer all the same."""
    keys = AskedKeys.parse(issuer.jwks(), ALGORITHMS, "issuers.0.jwks")
    auth = authenticator(issuer, keys=keys)
    token = jwt.encode(issuer.claims(), issuer.ed, algorithm="EdDSA", headers={"kid": "made up"})
    bearer = f"Bearer {token}".encode()

    async def crowd() -> list[object]:
        crowding = [asyncio.create_task(auth.authenticate(bearer, "192.0.2.1")) for _ in range(MAX_VERIFYING + 9)]
        neighbour = asyncio.create_task(auth.authenticate(bearer, "192.0.2.2"))
        while keys.waiting < MAX_VERIFYING + 1:
            await asyncio.sleep(0)
        known = await auth.authenticate(f"Bearer {issuer.token()}".encode(), "192.0.2.2")
        keys.answered.set()
        return [known, *await asyncio.gather(*crowding, neighbour, return_exceptions=True)]

    known, *refusals = asyncio.run(crowd())
    said = [refusal.problem for refusal in refusals if isinstance(refusal, Refusal)]
    assert known is not None
    assert said == [problems.INVALID_TOKEN] * MAX_VERIFYING + [problems.RATE_LIMITED] * 9 + [problems.INVALID_TOKEN]


NAMED = {
    "sub": "alice", "tenant": "acme", "realm_access": {"roles": ["b", "a"]}, "https://example.com/plan": "gold",
    "resource_access": {"my.client": {"roles": ["c"]}}, "permissions": "read write", "scp": ["other"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, {}),
        ({"groups": ("realm_access", "roles")}, {"groups": ("a", "b")}),
        ({"groups": ("resource_access", "my.client", "roles")}, {"groups": ("c",)}),
        ({"plan": ("https://example.com/plan",), "scopes": ("permissions",)}, {"plan": "gold", "scopes": ("read", "write")}),
        ({"tenant": ("organisation", "id"), "scopes": ("none",)}, {"tenant": "default", "scopes": ()}),
        ({"plan": ("realm_access",)}, None),
        ({"groups": ("realm_access",)}, None),
        ({"tenant": ("permissions",)}, None),
        ({"groups": ("sub", "roles")}, None),
        ({"scopes": ("tenant", "x")}, None),
        ({"groups": ("scp", "roles")}, None),
    ],
)
def test_claims_have_their_issuer_s_names_and_their_form(names: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """expected: of the principal, beside the usual ones; None: the claim has another form, and is refused."""
    usual: dict[str, Any] = {"subject": "alice", "tenant": "acme", "issuer": ISSUER, "scopes": ("other",)}
    with pytest.raises(BadClaim) if expected is None else contextlib.nullcontext():
        assert ClaimNames(**names).principal(NAMED, ISSUER, None) == Principal(**{**usual, **(expected or {})})


def test_nobody_is_let_in_before_the_revocations_are_read(issuer: Issuer) -> None:
    unread = Authenticator([trusted(issuer)], RevocationList(make_log(io.StringIO())), FailureThrottle(9), time.time)
    for _ in range(2):  # also not who is remembered
        assert refused(unread, issuer.token()).problem is problems.UNAVAILABLE


def test_failures_are_throttled_by_address(issuer: Issuer) -> None:
    auth = authenticator(issuer, throttle=3)
    known, bad = issuer.token(sub="known"), issuer.token(aud="other")
    principal(auth, known, "192.0.2.7")
    for places in (["192.0.2.7"] * 4, [f"2001:db8::{number}" for number in range(4)]):  # one IPv6 network is one address
        met = [refused(auth, bad, place) for place in places]
        assert [each.problem for each in met] == [problems.INVALID_TOKEN] * 3 + [problems.RATE_LIMITED]
        assert met[-1].retry_after is not None and 0 < met[-1].retry_after <= 61
    assert principal(auth, known, "192.0.2.7").subject == "known"  # a neighbour behind the same address, already known
    for other in ("192.0.2.8", "2001:db8:0:1::1"):
        assert refused(auth, bad, other).problem is problems.INVALID_TOKEN


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


HEADERS = st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), JSON)
NAMES = ["aud", "exp", "nbf", "iat", "sub", "jti", "groups", "tenant", "scope", "plan", "cnf"]


@given(headers=HEADERS, claims=st.dictionaries(st.sampled_from(["iss", *NAMES]), JSON))
def test_nothing_but_a_refusal_escapes_unsigned_claims(issuer: Issuer, headers: dict[str, Any], claims: dict[str, Any]) -> None:
    token = f"{b64({'alg': 'EdDSA', 'kid': 'ed', **headers})}.{b64({**issuer.claims(), **claims})}.AAAA"
    refused(authenticator(issuer), token)


@given(claims=st.dictionaries(st.sampled_from(NAMES), JSON))
def test_nothing_but_a_refusal_escapes_signed_claims(issuer: Issuer, claims: dict[str, Any]) -> None:
    payload = json.dumps({**issuer.claims(), **claims}).encode()
    token = jwt.api_jws.encode(payload, issuer.ed, "EdDSA", headers={"kid": "ed"})
    try:
        found = principal(authenticator(issuer), token)
    except Refusal:
        return
    assert is_name(found.subject) and found.tenant.isascii()


@given(st.binary(max_size=200))
def test_nothing_but_a_refusal_escapes_bytes(issuer: Issuer, value: bytes) -> None:
    for authorization in (value, b"Bearer " + value, b"Bearer " + (value or b"a") * MAX_TOKEN):
        refused(authenticator(issuer), authorization)


ABSENT = object()
SHORT = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
WEAK = {**RSAAlgorithm.to_jwk(SHORT, as_dict=True), "kid": "old"}
OTHER_ED = {"kty": "OKP", "crv": "Ed25519", "kid": "o"}


def unusable(good: dict[str, Any], change: Any) -> Any:
    """A whole key, or the good one with some members changed."""
    if not isinstance(change, dict):
        return change
    members = change if "kty" in change else {**good, "kid": "another", **change}
    return {name: value for name, value in members.items() if value is not ABSENT}


# What beside a good RSA key cannot be used: members in the place of that key's, or another key, or none.
UNUSABLE: dict[str, Any] = {
    "RSA of 1024 bits": WEAK, "another key of the same kid": {**WEAK, "kid": "rsa"},
    "x5c without n and e": {"kty": "RSA", "use": "sig", "kid": "x", "x5c": ["MIIB"]},
    "x5c that is garbage, and no key": {"kty": "EC", "kid": "x", "x5c": [{"a": 1}, None]},
    "EC without y": {"kty": "EC", "crv": "P-256", "kid": "e", "x": "AAAA"},
    "EC off its curve": {"kty": "EC", "crv": "P-256", "kid": "e", "x": "A" * 43, "y": "B" * 43},
    "Ed25519 that is too short": {**OTHER_ED, "x": "AAAA"}, "Ed25519 that is not base64url": {**OTHER_ED, "x": "!"},
    "Ed25519 that is a number": {**OTHER_ED, "x": 1}, "n that is a number": {"n": 5}, "n that is not base64url": {"n": "!!"},
    "n that is huge": {"n": "A" * 100_000}, "e that is even": {"e": "Ag"}, "e that is empty": {"e": ""},
    "kid that is a number": {"kid": 7}, "kid that is a list": {"kid": ["rsa"]}, "kid that is null": {"kid": None},
    "no kid": {"kid": ABSENT}, "alg that is a list": {"alg": ["RS256"]}, "key_ops that is text": {"key_ops": "verify"},
    "no object": "key", "null": None, "a list": [], "a number": 1, "kty that is absent": {"kty": ABSENT, "kid": "q"},
    "kty that is unknown": {"kty": "AKP", "alg": "ML-DSA-65", "kid": "q", "pub": "AAAA"},
    "kty that is a list": {"kty": ["RSA"], "kid": "q"},
    "crv that is unknown": {"kty": "EC", "crv": "secp256k1", "kid": "k", "x": "AAAA", "y": "AAAA"},
    "crv that is a list": {**OTHER_ED, "crv": ["Ed25519"]}, "for encryption": {"use": "enc", "alg": "RSA-OAEP"},
    "for encryption, by its operations": {"key_ops": ["encrypt", "wrapKey"]}, "for a use that is unknown": {"use": "tls"},
    "of an algorithm that is not pinned": {"alg": "PS512"}, "of an algorithm of another kind": {"alg": "ES256"},
}  # fmt: skip
# Well-formed, and meant for others: nothing is wrong with them, and so there is nothing to say.
NOT_FOR_SIGNATURES = frozenset(name for name in UNUSABLE if name.startswith(("for ", "of ")))


def jwk(issuer: Issuer, number: int = 0, *without: str) -> dict[str, Any]:
    """Of the issuer's set: the Ed25519, the EC or the RSA key."""
    return {name: value for name, value in issuer.jwks()["keys"][number].items() if name not in without}


# RFC 8037, appendix A: a key, and its secret.
ED = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
SECRET = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"
RSA = jwk(Issuer(), 2)


@pytest.mark.parametrize(
    ("document", "algorithms", "said"),
    [
        *((none, ALGORITHMS, "") for none in (None, [], {}, {"keys": []}, {"keys": {}})),
        *(({"keys": [one]}, ALGORITHMS, "") for one in ("x", {**ED, "x": "!"}, {**ED, "use": "enc"})),
        ({"keys": [WEAK]}, ALGORITHMS, "2048"),
        ({"keys": [ED, ED]}, ALGORITHMS, "no kid"),
        ({"keys": [ED]}, ("PS256",), "PS256"),
        # A set with a private key leaked whole.
        *(({"keys": [RSA, {**ED, **member}]}, ALGORITHMS, "private or symmetric")
          for member in ({"d": SECRET}, {"p": "AAAA"}, {"k": "AAAA"}, {"priv": "AAAA"}, {"kty": "oct"})),
        ({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}, ALGORITHMS, "private or symmetric"),
    ],
)  # fmt: skip
def test_a_key_set_that_must_not_be_used(document: object, algorithms: tuple[str, ...], said: str) -> None:
    """It is refused at start, with the key to change named."""
    with pytest.raises(SettingsError, match=r"^issuers\.0\.jwks") as error:
        KeySet.parse(document, algorithms, "issuers.0.jwks")
    assert said in str(error.value) and SECRET not in str(error.value)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_key_that_cannot_be_used_takes_no_other_along(kind: str, issuer: Issuer) -> None:
    """RFC 7517 section 5, before a good key and after it; the log says which one and why, where it says anything."""
    good = jwk(issuer, 2)
    other = unusable(good, UNUSABLE[kind])
    for members in ([good, other], [other, good], [other, other, good]):
        keys = KeySet.parse({"keys": members}, ALGORITHMS, "issuers.0.jwks")
        assert keys.find("rsa", "RS256") is not None
        assert all(reason.startswith("issuers.0.jwks: key") for reason in keys.passed_over)
    assert bool(keys.passed_over) == (kind not in NOT_FOR_SIGNATURES)
    assert principal(authenticator(issuer, keys=keys), issuer.token(kid="rsa")).subject == "alice"


def test_of_two_keys_of_one_kid_the_first_counts_and_one_key_alone_needs_no_kid(issuer: Issuer) -> None:
    good, token = jwk(issuer), issuer.token()
    unnamed = jwt.encode(issuer.claims(), issuer.ed, algorithm="EdDSA")
    for members, passed_over, sent in (
        ([good, {**jwk(Issuer()), "kid": "ed"}], ["jwks: key 1: is a second key of the same kid: give each its own"], token),
        ([good, good], [], token),
        ([jwk(issuer, 0, "kid")], [], unnamed),
    ):
        keys = KeySet.parse({"keys": members}, ALGORITHMS, "jwks")
        assert list(keys.passed_over) == passed_over
        assert principal(authenticator(issuer, keys=keys), sent).subject == "alice"
