"""Proofs of possession: what the SDK makes, what verifies, and which requests carry them. The attacks: `test_token_attacks`."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import ProofKey, problems
from lacre.errors import InvalidMessage, LacreError, SettingsError, VerificationError
from lacre.jose import dpop
from lacre.jose.jws import b64u
from lacre.wire.header import inspect_request
from parts.relay import SEALED, Relay, connect, connect_async, refusing

URL = "https://gateway.example/v1/sealed"
MAKERS: dict[str, Callable[[], ProofKey]] = {
    "ES256": ProofKey.generate,
    "EdDSA": lambda: ProofKey(Ed25519PrivateKey.generate()),
}


def parts(proof: str) -> tuple[dict[str, Any], dict[str, Any]]:
    header, payload, _ = proof.split(".")
    return json.loads(base64.urlsafe_b64decode(header + "==")), json.loads(base64.urlsafe_b64decode(payload + "=="))


@pytest.mark.parametrize("algorithm", MAKERS)
def test_what_a_proof_says(algorithm: str) -> None:
    key = MAKERS[algorithm]()
    proof = key.proof("POST", URL + "?query#fragment", token="a.b.c", request=bytes(32), nonce="n")
    header, claims = parts(proof)
    assert (header["typ"], header["alg"]) == ("dpop+jwt", algorithm)
    assert set(header["jwk"]) == ({"kty", "crv", "x", "y"} if algorithm == "ES256" else {"kty", "crv", "x"})
    jti, iat = claims.pop("jti"), claims.pop("iat")
    assert len(jti) >= 16 and abs(iat - time.time()) < 60
    ath = b64u(hashlib.sha256(b"a.b.c").digest())
    assert claims == {"htm": "POST", "htu": URL, "ath": ath, "lacre_req": b64u(bytes(32)), "nonce": "n"}
    jwt.decode(proof, jwt.PyJWK(header["jwk"], algorithm), algorithms=[algorithm])  # by its own key
    assert set(parts(key.proof("POST", URL))[1]) == {"jti", "htm", "htu", "iat"}


def test_thumbprint_of_rfc_8037() -> None:
    """Its appendix A.3."""
    public = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert dpop.thumbprint(public) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_proof_of_rfc_9449() -> None:
    """Its section 7.1: another implementation's proof, which has no more than the RFC asks for."""
    token = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU"
    proof = (
        "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscE"
        "JoRjQyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19"
        ".eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90ZWN0Z"
        "WRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNFc05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2o"
        "W9RP35yRqzhrtNP86L-Ey71EOptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
    )
    url = dpop.plain_url("https://resource.example.org/protectedresource")
    thumbprint = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
    expected = dpop.Expected("GET", url, dpop.token_hash(token), thumbprint)
    assert dpop.verify(proof, expected, 1562262618.0).request is None
    with pytest.raises(VerificationError, match="before or after"):
        dpop.verify(proof, expected, 1562262618.0 + dpop.WINDOW + 1)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: ".".join([b64u(data)] * 3)))
def test_nothing_but_our_errors_escape(text: str) -> None:
    with pytest.raises(LacreError):
        dpop.verify(text, dpop.Expected("POST", URL, "", ""), 0.0)


MEMBERS = st.sampled_from(["typ", "alg", "jwk", "crit", "kty", "crv", "x", "y"])
VALUES = ["dpop+jwt", "ES256", "EC", "P-256", "", 7, None, [], {}, {"kty": "EC", "crv": "P-256", "x": "A", "y": "A"}]


@given(st.dictionaries(MEMBERS, st.sampled_from(VALUES)))
def test_no_header_makes_anything_but_our_errors(header: dict[str, Any]) -> None:
    head = b64u(json.dumps(header).encode())
    with pytest.raises(LacreError):
        dpop.verify(f"{head}.e30.AAAA", dpop.Expected("POST", URL, "", ""), 0.0)


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://Gateway.Example/v1/sealed", "https://gateway.example:443/v1/sealed"),
        ("HTTPS://gateway.example:443/v1/sealed?x#y", "https://gateway.example:443/v1/sealed"),
        ("http://[::1]/", "http://[::1]:80/"),
        ("https://gateway.example", "https://gateway.example:443/"),
    ],
)
def test_plain_url(url: str, plain: str) -> None:
    assert dpop.plain_url(url) == plain


@pytest.mark.parametrize(
    "url", ["", "/v1/sealed", "ftp://x/", "https://user@x/", "https://x:port/", "https:///x", "https://[x"]
)
def test_no_url(url: str) -> None:
    with pytest.raises(InvalidMessage):
        dpop.plain_url(url)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_keys_are_kept_in_files(tmp_path: Path, make: Callable[[], ProofKey]) -> None:
    key, path = make(), tmp_path / "key.pem"
    path.write_bytes(key.pem())
    assert ProofKey.load(path).thumbprint == key.thumbprint
    assert b64u(key.pem()) not in repr(key) and "PRIVATE" not in repr(key)


P384 = ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense",
        P384.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
        ProofKey.generate().pem().replace(b"PRIVATE KEY", b"PUBLIC KEY"),
        None,
    ],
    ids=["no PEM", "encrypted", "no private key", "missing"],
)
def test_what_is_no_key_is_said(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(SettingsError, match=r"key\.pem"):
        ProofKey.load(tmp_path / "key.pem")


@pytest.mark.parametrize("key", [P384, rsa.generate_private_key(65537, 2048)], ids=["P-384", "RSA"])
def test_keys_of_other_kinds_are_refused(key: Any) -> None:
    with pytest.raises(SettingsError, match=r"ProofKey.generate"):
        ProofKey(key)


# In the clients


def check(relay: Relay, key: ProofKey, count: int) -> None:
    """Each sealed request has a proof of its own, for itself; the manifest was fetched without any."""
    assert len({request.headers["dpop"] for request in relay.sealed}) == len(relay.sealed) == count
    for request in relay.sealed:
        assert request.headers["authorization"] == "DPoP a.b.c"
        url = dpop.plain_url("http://127.0.0.1:9/v1/sealed")
        expected = dpop.Expected("POST", url, dpop.token_hash("a.b.c"), key.thumbprint)
        proof = dpop.verify(request.headers["dpop"], expected, time.time())
        assert proof.request == b64u(inspect_request(request.content).digest)
    for request in relay.requests:
        if request not in relay.sealed:
            assert "dpop" not in request.headers and "authorization" not in request.headers


@pytest.mark.parametrize("place", ["argument", "environment"])
def test_each_request_and_each_attempt_has_a_proof(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    key = ProofKey.generate()
    (tmp_path / "key.pem").write_bytes(key.pem())
    if place == "environment":
        monkeypatch.setenv("LACRE_DPOP_KEY", str(tmp_path / "key.pem"))
    answers = iter([refusing(problems.UNKNOWN_KEY), *[lambda _: None] * 2])
    relay.respond = lambda request: next(answers)(request) if request.url.path == SEALED else None
    with connect(relay, token="a.b.c", dpop=key if place == "argument" else None) as client:
        assert [client.chat("Count.").attempts for _ in range(2)] == [2, 1]
    check(relay, key, 3)


async def test_async_client(relay: Relay) -> None:
    key = ProofKey.generate()
    async with connect_async(relay, token="a.b.c", dpop=key) as client:
        for _ in range(2):
            assert (await client.chat("Count.")).text == "one two three"
    check(relay, key, 2)


def test_without_a_key_nothing_of_it_is_sent(client: lacre.Client, relay: Relay) -> None:
    client.chat("Count.")
    assert [request.headers["authorization"] for request in relay.sealed] == ["Bearer t0ken"]
    assert not any("dpop" in request.headers for request in relay.requests)
