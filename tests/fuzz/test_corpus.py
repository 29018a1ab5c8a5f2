"""Every input of the corpus through its target, without a fuzzer; and that an invariant which does not hold is noticed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from fuzz import wire
from fuzz.seeds import CORPUS, seeds
from fuzz.target import Target
from fuzz.targets import TARGETS
from lacre.errors import InvalidMessage

INPUTS = sorted(CORPUS.glob("*/*"))
# What each search begins with must get past the first checks; these are refused on purpose.
REFUSED = {
    "deltas": {"error"}, "issuer": {"odd-tag"}, "reply": {"error"}, "jws": {"critical"},
    "exchange": {"pieces", "cut", "manifest"},
    "manifest": {"huge-number"}, "grant": {"huge-number"}, "receipt": {"huge-number"}, "audit_header": {"path"},
    "chat_template": {"doubling", "nested", "wide", "inside"},
}  # fmt: skip


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_input(path: Path) -> None:
    target, data = TARGETS[path.parent.name], path.read_bytes()
    for smaller in (data, data[: len(data) // 2], data[1:], b""):
        target.check_memory(smaller)
    if not path.name.startswith("found-"):
        refused = path.name in REFUSED.get(path.parent.name, ())
        with pytest.raises(target.refuses) if refused else nullcontext():
            target.parse(data)


def test_the_corpus_is_what_the_encoders_make() -> None:
    """Where this fails a format has changed: `PYTHONPATH=tests .venv/bin/python -m fuzz.seeds`."""
    expected = seeds()
    assert {path for path in INPUTS if not path.name.startswith("found-")} == set(expected)
    assert [path for path, data in expected.items() if path.read_bytes() != data] == []
    assert {path.parent.name for path in INPUTS} == set(TARGETS)


def test_another_error_is_noticed() -> None:
    with pytest.raises(IndexError):
        Target("broken", lambda data: data[0], (InvalidMessage,)).check(b"")


def test_memory_out_of_proportion_is_noticed() -> None:
    with pytest.raises(AssertionError, match="bytes of memory"):
        Target("broken", lambda _data: bytearray(2**21), ()).check_memory(b"")


def test_an_invariant_is_no_place_for_a_refusal() -> None:
    def holds(_data: bytes, _parsed: object) -> None:
        raise InvalidMessage("what was read cannot be read again")

    with pytest.raises(InvalidMessage):
        Target("broken", bytes, (InvalidMessage,), holds).check(b"")


def test_other_bytes_than_were_sealed_are_noticed() -> None:
    script = wire.Script(bytes([wire.RECORD]) + b"\x00\x04some" + bytes([wire.FINAL]) + b"\x00\x00")
    aead = wire.ohttp.response_aead(wire.HEADER, wire.RESPONSE_SECRET, wire.NONCE)
    sealed = wire.sealed_by(script, aead, wire.NONCE)
    assert sealed.must_open and not sealed.must_not

    def opened(plaintext: bytes) -> bytes | None:
        opener = wire.ohttp.ResponseOpener(wire.HEADER, wire.RESPONSE_SECRET)
        return wire._opened(opener, [sealed.message], replace(sealed, plaintext=plaintext), wire.OF_A_RESPONSE)

    assert opened(b"some") == b"some"
    with pytest.raises(AssertionError):
        opened(b"other")
