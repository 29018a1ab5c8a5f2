"""base64url without padding: the standard library's, and only its canonical form is accepted."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import InvalidMessage
from lacre.jose.jws import b64u, b64u_decode


@given(st.binary(max_size=64))
def test_it_is_the_standard_library_s(data: bytes) -> None:
    assert b64u(data) == base64.urlsafe_b64encode(data).decode().rstrip("=")
    assert b64u_decode(b64u(data)) == data


@given(st.text(alphabet="AQgw-_+/=. é", max_size=8))
def test_other_forms_are_refused(text: str) -> None:
    try:
        data = b64u_decode(text)
    except InvalidMessage:
        return
    assert b64u(data) == text


@pytest.mark.parametrize("text", ["+/+/", "AA==", "A", "AB", "A A", "AA\n", "é"])
def test_examples(text: str) -> None:
    with pytest.raises(InvalidMessage):
        b64u_decode(text)
