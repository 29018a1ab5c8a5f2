"""HPKE against the published vectors and, both ways, against `cryptography`'s single-shot implementation."""

import json
from pathlib import Path
from typing import Any

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives import hpke as reference
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from lacre import errors
from lacre.wire import hpke
from lacre.wire.header import Aead, Kdf, Kem, Suite
from lacre.wire.opening import PrivateKey

Vector = dict[str, Any]
EXPORT_ONLY = 0xFFFF
HKDF_SHA256 = 0x0001


def _load() -> list[Vector]:
    folder = Path(cryptography_vectors.__file__).parent / "HPKE"
    return [
        vector
        for name in ("test-vectors.json", "hpke-pq-test-vectors.json")
        for vector in json.loads((folder / name).read_text())
        if vector["mode"] == 0 and vector["kem_id"] in list(Kem)
    ]


def _name(vector: Vector) -> str:
    return f"{Kem(vector['kem_id']).label}-kdf{vector['kdf_id']}-aead{vector['aead_id']}"


VECTORS = _load()
WITH_OUR_KDF = [vector for vector in VECTORS if vector["kdf_id"] == HKDF_SHA256]
SEALING = [vector for vector in WITH_OUR_KDF if vector["aead_id"] != EXPORT_ONLY]
SUITES = [Suite(kem, Kdf.HKDF_SHA256, aead) for kem in Kem for aead in Aead]


def hexed(vector: Vector, name: str) -> bytes:
    return bytes.fromhex(vector[name])


def context_of(vector: Vector) -> hpke.Context:
    suite = Suite(Kem(vector["kem_id"]), Kdf(vector["kdf_id"]), Aead(vector["aead_id"]))
    return hpke.Context(suite, hexed(vector, "shared_secret"), hexed(vector, "info"))


def test_the_vectors_are_all_there() -> None:
    """A file that lost its vectors would make every test below pass."""
    names = ["MLKEM768-X25519-kdf1-aead3", "X25519-kdf1-aead1", "X25519-kdf1-aead2", "X25519-kdf1-aead3"]
    assert (sorted(map(_name, SEALING)), len(WITH_OUR_KDF), len(VECTORS)) == (names, 5, 11)


@pytest.mark.parametrize("vector", VECTORS, ids=_name)
def test_vector_key_pair_and_decapsulation(vector: Vector) -> None:
    """The KEM does not depend on the suite's KDF, so vectors for KDFs that we do not have count too."""
    kem = Kem(vector["kem_id"])
    derived = PrivateKey.derive(1, kem, hexed(vector, "ikmR"))
    assert derived.to_bytes() == PrivateKey(1, kem, hexed(vector, "skRm")).to_bytes()
    assert derived.config.public_key == hexed(vector, "pkRm")
    assert derived.decapsulate(hexed(vector, "enc")) == hexed(vector, "shared_secret")


@pytest.mark.parametrize("vector", VECTORS, ids=_name)
def test_vector_encapsulation(vector: Vector) -> None:
    """`cryptography` draws ML-KEM's coins itself: of X-Wing, the X25519 half must be the vector's, and the rest decapsulate."""
    kem = Kem(vector["kem_id"])
    if kem is Kem.XWING:
        private = hexed(vector, "ikmE")[32:]
    else:  # the key of this, which the three algorithm pairs follow
        private = PrivateKey.derive(1, kem, hexed(vector, "ikmE")).to_bytes()[-12 - 32 : -12]
    ephemeral = X25519PrivateKey.from_private_bytes(private)
    secret, enc = hpke.encapsulate_for_test_vectors(kem, hexed(vector, "pkRm"), ephemeral)
    assert len(enc) == kem.n_enc
    assert enc[-32:] == hexed(vector, "enc")[-32:]
    assert PrivateKey(1, kem, hexed(vector, "skRm")).decapsulate(enc) == secret
    assert kem is Kem.XWING or secret == hexed(vector, "shared_secret")


@pytest.mark.parametrize("vector", WITH_OUR_KDF, ids=_name)
def test_vector_key_schedule_and_exports(vector: Vector) -> None:
    """Export-only suites have no AEAD, and everything but it."""
    suite_id = b"HPKE" + b"".join(vector[name].to_bytes(2, "big") for name in ("kem_id", "kdf_id", "aead_id"))
    schedule = hpke.KeySchedule(suite_id, hexed(vector, "shared_secret"), hexed(vector, "info"))
    assert schedule.derive(b"exp", 32) == hexed(vector, "exporter_secret")
    if vector["aead_id"] != EXPORT_ONLY:
        assert schedule.derive(b"key", Aead(vector["aead_id"]).n_key) == hexed(vector, "key")
        assert schedule.derive(b"base_nonce", 12) == hexed(vector, "base_nonce")
    for one in vector["exports"]:
        exported = hpke.export(suite_id, hexed(vector, "exporter_secret"), hexed(one, "exporter_context"), one["L"])
        assert exported == hexed(one, "exported_value")


@pytest.mark.parametrize("vector", SEALING, ids=_name)
def test_vector_sealing_and_opening_in_sequence(vector: Vector) -> None:
    sender, recipient = context_of(vector), context_of(vector)
    assert len(vector["encryptions"]) >= 10
    for one in vector["encryptions"]:
        sealed = sender.aead.seal(hexed(one, "pt"), hexed(one, "aad"))
        assert sealed == hexed(one, "ct")
        assert recipient.aead.open(sealed, hexed(one, "aad")) == hexed(one, "pt")
    for one in vector["exports"]:
        assert sender.export(hexed(one, "exporter_context"), one["L"]) == hexed(one, "exported_value")


# Against another implementation


def _reference(suite: Suite) -> reference.Suite:
    kems = {Kem.X25519: reference.KEM.X25519, Kem.XWING: reference.KEM.MLKEM768_X25519}
    return reference.Suite(kems[suite.kem], reference.KDF.HKDF_SHA256, getattr(reference.AEAD, suite.aead.name))


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_one_seals_and_the_other_opens(suite: Suite) -> None:
    x_key, m_key = X25519PrivateKey.generate(), MLKEM768PrivateKey.generate()
    theirs: Any = x_key
    public_key = x_key.public_key().public_bytes_raw()
    ours = PrivateKey.generate(1, suite.kem)
    raw = ours.config.public_key
    of_ours: Any = X25519PublicKey.from_public_bytes(raw[-32:])
    if suite.kem is Kem.XWING:
        theirs = reference.MLKEM768X25519PrivateKey(m_key, x_key)
        public_key = m_key.public_key().public_bytes_raw() + public_key
        of_ours = reference.MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(raw[:1184]), of_ours)
    secret, enc = hpke.encapsulate(suite.kem, public_key)
    sealed = hpke.Context(suite, secret, b"info").aead.seal(b"a prompt")
    assert _reference(suite).decrypt(enc + sealed, theirs, b"info") == b"a prompt"
    sealed = _reference(suite).encrypt(b"a prompt", of_ours, b"info")
    enc, ciphertext = sealed[: suite.kem.n_enc], sealed[suite.kem.n_enc :]
    assert hpke.Context(suite, ours.decapsulate(enc), b"info").aead.open(ciphertext) == b"a prompt"


# What must not happen


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_a_failed_opening_does_not_move_the_counter(suite: Suite) -> None:
    """RFC 9180 section 5.2: the sequence number rises only after a successful opening."""
    sender, recipient = hpke.Context(suite, bytes(32), b""), hpke.Context(suite, bytes(32), b"")
    first, second = sender.aead.seal(b"one"), sender.aead.seal(b"two")
    for wrong in (second, first[:-1], first + b"\x00", b"", first):
        with pytest.raises(errors.OpenError):
            recipient.aead.open(wrong, b"" if wrong is not first else b"other aad")
    assert recipient.aead.open(first) == b"one"
    assert recipient.aead.open(second) == b"two"


def test_the_counter_cannot_come_round() -> None:
    aead = hpke.SequencedAead(Aead.AES_128_GCM, bytes(16), b"\xff" * 12)
    aead._sequence = 2**96 - 1
    aead.seal(b"the last one")
    with pytest.raises(OverflowError):
        aead.seal(b"one too many")


# Points of small order on Curve25519 and its twist, and their non-canonical forms (RFC 7748 section 7).
LOW_ORDER = [
    "00" * 32, "01" + "00" * 31, *(first + "ff" * 30 + "7f" for first in ("ec", "ed", "ee")),
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
]  # fmt: skip


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("kem", list(Kem))
def test_a_shared_secret_of_zeros_is_refused(kem: Kem, point: str) -> None:
    """RFC 9180 section 7.1.4. Such a point would make the X25519 half known to everybody."""
    key = PrivateKey.generate(1, kem)
    low = bytes.fromhex(point)
    with pytest.raises(errors.InvalidMessage):
        hpke.encapsulate(kem, key.config.public_key[:-32] + low)
    _, enc = hpke.encapsulate(kem, key.config.public_key)
    with pytest.raises(errors.InvalidMessage):
        key.decapsulate(enc[:-32] + low)


def test_an_mlkem_key_out_of_range_is_refused() -> None:
    """FIPS 203 section 7.2: coefficients must be reduced."""
    public_key = PrivateKey.generate(1, Kem.XWING).config.public_key
    with pytest.raises(errors.InvalidMessage):
        hpke.encapsulate(Kem.XWING, b"\xff" * 1184 + public_key[-32:])


@pytest.mark.parametrize("length", [0, -1, hpke.MAX_EXPORT + 1])
def test_an_export_of_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(errors.UsageError):
        hpke.Context(SUITES[0], bytes(32), b"").export(b"context", length)
