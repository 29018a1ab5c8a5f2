"""Proofs of possession: what the SDK makes, what verifies, and which requests carry them. The attacks: `test_token_attacks`."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import ProofKey
from lacre.errors import InvalidMessage, LacreError, SettingsError, VerificationError
from lacre.jose import dpop
from lacre.jose.jws import b64u
from lacre.wire.header import inspect_request
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire, served

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
        "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6Ik"
        "VDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRjQyVVFVZldWQVdCR"
        "nMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JE"
        "QSIsImNydiI6IlAtMjU2In19.eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIj"
        "oiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90ZWN0Z"
        "WRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNF"
        "c05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2oW9RP35yRqzhrtNP86L-Ey71E"
        "OptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
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


@given(
    st.dictionaries(
        st.sampled_from(["typ", "alg", "jwk", "crit", "kty", "crv", "x", "y"]),
        st.sampled_from(
            ["dpop+jwt", "ES256", "EC", "P-256", "", 7, None, [], {}, {"kty": "EC", "crv": "P-256", "x": "A", "y": "A"}]
        ),
    )
)
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


def test_keys_are_kept_in_files(tmp_path: Path) -> None:
    for make in MAKERS.values():
        key = make()
        path = tmp_path / "key.pem"
        path.write_bytes(key.pem())
        assert ProofKey.load(path).thumbprint == key.thumbprint
        assert b64u(key.pem()) not in repr(key) and "PRIVATE" not in repr(key)


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense",
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, encryption_algorithm=BestAvailableEncryption(b"x")
        ),
        lacre.ProofKey.generate().pem().replace(b"PRIVATE KEY", b"PUBLIC KEY"),
    ],
    ids=["no PEM", "encrypted", "no private key"],
)
def test_what_is_no_key_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(SettingsError, match=r"key\.pem"):
        ProofKey.load(tmp_path / "key.pem")
    with pytest.raises(SettingsError, match=r"missing\.pem"):
        ProofKey.load(tmp_path / "missing.pem")


def test_keys_of_other_kinds_are_refused() -> None:
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(public_exponent=65537, key_size=2048)):
        with pytest.raises(SettingsError, match=r"ProofKey.generate"):
            ProofKey(key)  # type: ignore[arg-type]


# In the clients


def sealed(relay: Relay) -> list[httpx2.Request]:
    return [request for request in relay.requests if request.url.path == "/v1/sealed"]


def check(relay: Relay, key: ProofKey, token: str) -> None:
    """Each sealed request has a proof of its own, for itself; the manifest was fetched without any."""
    assert len({request.headers["dpop"] for request in sealed(relay)}) == len(sealed(relay)) > 0
    for request in sealed(relay):
        assert request.headers["authorization"] == f"DPoP {token}"
        expected = dpop.Expected("POST", dpop.plain_url("http://127.0.0.1:9/v1/sealed"), dpop.token_hash(token), key.thumbprint)
        proof = dpop.verify(request.headers["dpop"], expected, time.time())
        assert proof.request == b64u(inspect_request(request.content).digest)
    for request in relay.requests:
        if request not in sealed(relay):
            assert "dpop" not in request.headers and "authorization" not in request.headers


def test_sync_client() -> None:
    relay, key = Relay(ChatApp()), ProofKey.generate()
    with lacre.Client(relay.url, token="a.b.c", dpop=key, memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        for _ in range(2):
            assert client.chat("Count.").text == "one two three"
    check(relay, key, "a.b.c")


async def test_async_client() -> None:
    relay, key = Relay(ChatApp()), ProofKey.generate()
    memory = lacre.VersionMemory()
    async with lacre.AsyncClient(relay.url, token="a.b.c", dpop=key, memory=memory, transport=AsyncWire(relay)) as client:
        for _ in range(2):
            assert (await client.chat("Count.")).text == "one two three"
    check(relay, key, "a.b.c")


def test_a_second_attempt_has_another_proof() -> None:
    relay, key = Relay(ChatApp()), ProofKey.generate()
    answered: list[int] = []

    def unknown_key_once(request: httpx2.Request) -> httpx2.Response | None:
        if request.url.path != "/v1/sealed" or answered:
            return None
        answered.append(1)
        problem = lacre.problems.UNKNOWN_KEY
        return served(problem.status, problem.body(), {"content-type": "application/problem+json"})

    relay.respond = unknown_key_once
    with lacre.Client(relay.url, token="a.b.c", dpop=key, memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        assert client.chat("Count.").attempts == 2
    assert len(sealed(relay)) == 2
    check(relay, key, "a.b.c")


def test_the_key_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relay, key = Relay(ChatApp()), ProofKey.generate()
    (tmp_path / "key.pem").write_bytes(key.pem())
    monkeypatch.setenv("LACRE_DPOP_KEY", str(tmp_path / "key.pem"))
    with lacre.Client(relay.url, token="a.b.c", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        client.chat("Count.")
    check(relay, key, "a.b.c")


def test_without_a_key_nothing_of_it_is_sent() -> None:
    relay = Relay(ChatApp())
    with lacre.Client(relay.url, token="a.b.c", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        client.chat("Count.")
    assert [request.headers["authorization"] for request in sealed(relay)] == ["Bearer a.b.c"]
    assert not any("dpop" in request.headers for request in relay.requests)
