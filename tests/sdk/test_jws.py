"""Signed statements: whichever way a header that says the same is written, and nothing else."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidSignature, LacreError
from lacre.jose.jws import b64u, raw_public_key, sign, verify

KEY = Ed25519PrivateKey.generate()
PUBLIC = raw_public_key(KEY)
TYP = "lacre-grant+jwt"
SAID = {"jti": "x", "exp": 7}
OURS = sign(SAID, KEY, TYP)


def signed(header: dict[str, str], payload: bytes = b'{"jti":"x","exp":7}') -> str:
    text = f"{b64u(json.dumps(header).encode())}.{b64u(payload)}"
    return f"{text}.{b64u(KEY.sign(text.encode()))}"


OTHER = signed({"typ": TYP, "alg": "EdDSA"})


@pytest.mark.parametrize("token", [OURS, OTHER], ids=["ours", "in other words"])
class TestBothReadings:
    def test_it_is_read(self, token: str) -> None:
        assert verify(token, PUBLIC, TYP) == SAID

    def test_another_key(self, token: str) -> None:
        with pytest.raises(InvalidSignature):
            verify(token, raw_public_key(Ed25519PrivateKey.generate()), TYP)

    def test_another_type(self, token: str) -> None:
        with pytest.raises(InvalidSignature):
            verify(token, PUBLIC, "lacre-receipt+jwt")

    def test_any_character_changed(self, token: str) -> None:
        for at, character in enumerate(token):
            for other in {"A", "é", ".", "="} - {character}:
                with pytest.raises(LacreError):
                    verify(token[:at] + other + token[at + 1 :], PUBLIC, TYP)

    def test_any_end_cut_off(self, token: str) -> None:
        for end in range(len(token)):
            with pytest.raises(LacreError):
                verify(token[:end], PUBLIC, TYP)


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff"])
def test_payloads_that_say_nothing(payload: bytes) -> None:
    for header in ({"alg": "EdDSA", "typ": TYP}, {"typ": TYP, "alg": "EdDSA"}):
        with pytest.raises(LacreError):
            verify(signed(header, payload), PUBLIC, TYP)
