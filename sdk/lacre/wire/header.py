"""All that a relay may read of a sealed request: key configurations, the request header, and where its chunks begin and end.

This file never sees a private key or a byte of plaintext, and imports nothing that could open a message. It is the only part of
`lacre.wire` that reads messages and that the gateway may import.

    key configuration  key_id(1) ‖ kem(2) ‖ public key ‖ algorithms length(2) ‖ { kdf(2) ‖ aead(2) }+    RFC 9458 section 3
    sealed request     key_id(1) ‖ kem(2) ‖ kdf(2) ‖ aead(2) ‖ enc ‖ chunks                             RFC 9458 section 4
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Final, Self

from lacre import errors
from lacre.wire import framing

MEDIA_TYPE_REQUEST: Final = "message/ohttp-chunked-req"
MEDIA_TYPE_RESPONSE: Final = "message/ohttp-chunked-res"
MEDIA_TYPE_KEYS: Final = "application/ohttp-keys"
MANIFEST_VERSION: Final = "lacre-manifest"  # of an answer: the version that the gateway has; nobody signs it
SEALED_PATH: Final = "/v1/sealed"  # where a gateway takes sealed requests
WELL_KNOWN: Final = "/.well-known/ohttp-gateway"  # where an application without a gateway does (RFC 9540 section 4)
# The host name of the application inside the seal. RFC 2606: it never resolves, so a request that escaped its seal reaches no
# server.
AUTHORITY: Final = "lacre.invalid"

# Bytes of plaintext in a chunk.
MAX_CHUNK: Final = framing.MAX_CHUNK
# Leaves room for the grant and the headers under the message fabric's limit of 9 MiB.
MAX_SEALED_REQUEST: Final = 7 * 2**20
# A full request needs 448 chunks. The limit bounds a relay's work for a body of tiny ones (18 bytes each).
MAX_REQUEST_CHUNKS: Final = 8192
# Some fifty X-Wing configurations; a pool has two or three.
MAX_KEY_LIST: Final = 65536

_HEADER: Final = struct.Struct(">BHHH")


class Kem(IntEnum):
    """HPKE KEM identifiers (RFC 9180 section 7.1; draft-ietf-hpke-pq)."""

    X25519 = 0x0020
    XWING = 0x647A

    @property
    def label(self) -> str:
        return "X25519" if self is Kem.X25519 else "MLKEM768-X25519"

    @property
    def n_enc(self) -> int:
        """Length of an encapsulated key."""
        return 32 if self is Kem.X25519 else 1120

    @property
    def n_pk(self) -> int:
        """Length of a public key."""
        return 32 if self is Kem.X25519 else 1216


class Kdf(IntEnum):
    """HPKE KDF identifiers. SHAKE is not among them: the OHTTP response schedule needs two-stage Extract and Expand."""

    HKDF_SHA256 = 0x0001


class Aead(IntEnum):
    """HPKE AEAD identifiers (RFC 9180 section 7.3)."""

    AES_128_GCM = 0x0001
    AES_256_GCM = 0x0002
    CHACHA20_POLY1305 = 0x0003

    @property
    def n_key(self) -> int:
        return 16 if self is Aead.AES_128_GCM else 32

    @property
    def n_nonce(self) -> int:
        return 12


# Bytes at the start of a sealed request that hold its header, whichever KEM it uses.
MAX_HEADER: Final = _HEADER.size + max(kem.n_enc for kem in Kem)
_KEMS: Final = frozenset(Kem)
_KDFS: Final = frozenset(Kdf)
_AEADS: Final = frozenset(Aead)


@dataclass(frozen=True, slots=True)
class Suite:
    """One choice of KEM, KDF and AEAD."""

    kem: Kem
    kdf: Kdf
    aead: Aead


# 256-bit keys first: a key search with Grover's algorithm halves the bits.
PREFERRED_AEADS: Final = (Aead.AES_256_GCM, Aead.CHACHA20_POLY1305, Aead.AES_128_GCM)
ALL_ALGORITHMS: Final = tuple((Kdf.HKDF_SHA256, aead) for aead in PREFERRED_AEADS)


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """A public key and the algorithms that its holder accepts with it."""

    key_id: int
    kem: Kem
    public_key: bytes = field(repr=False)
    algorithms: tuple[tuple[Kdf, Aead], ...] = ALL_ALGORITHMS

    def __post_init__(self) -> None:
        if not 0 <= self.key_id <= 0xFF:
            raise errors.UsageError("a key id is one byte")
        if len(self.public_key) != self.kem.n_pk:
            raise errors.UsageError(f"a public key of {self.kem.label} has {self.kem.n_pk} bytes")
        if not 0 < len(self.algorithms) < 1 << 14:
            raise errors.UsageError("a key configuration names at least one KDF and AEAD")

    def encode(self) -> bytes:
        pairs = b"".join(struct.pack(">HH", kdf, aead) for kdf, aead in self.algorithms)
        return struct.pack(">BH", self.key_id, self.kem) + self.public_key + struct.pack(">H", len(pairs)) + pairs

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """A whole key configuration. It ignores algorithms that this side does not have (RFC 9458 section 3.1).

        Raises InvalidMessage, and UnsupportedSuite if this side can use nothing in it.
        """
        if len(data) < 3:
            raise errors.InvalidMessage("the key configuration is cut short")
        key_id, kem_id = struct.unpack_from(">BH", data)
        kem = _kem(kem_id)
        pairs_at = 3 + kem.n_pk + 2
        if len(data) < pairs_at:
            raise errors.InvalidMessage("the key configuration is cut short")
        pairs_length = int.from_bytes(data[pairs_at - 2 : pairs_at], "big")
        if pairs_length == 0 or pairs_length % 4 or len(data) != pairs_at + pairs_length:
            raise errors.InvalidMessage("the key configuration's list of algorithms has a wrong length")
        algorithms = tuple(
            (Kdf(kdf), Aead(aead))
            for kdf, aead in struct.iter_unpack(">HH", data[pairs_at:])
            if kdf in _KDFS and aead in _AEADS
        )
        if not algorithms:
            raise errors.UnsupportedSuite("the key configuration offers no KDF and AEAD that this side has")
        return cls(key_id, kem, bytes(data[3 : 3 + kem.n_pk]), algorithms)

    def suite(self, preferred: Sequence[Aead] = PREFERRED_AEADS) -> Suite:
        """The first of `preferred` that the configuration offers. Raises UnsupportedSuite if it offers none."""
        for aead in preferred:
            if (Kdf.HKDF_SHA256, aead) in self.algorithms:
                return Suite(self.kem, Kdf.HKDF_SHA256, aead)
        raise errors.UnsupportedSuite("the key configuration offers none of the AEADs asked for")

    def offers(self, suite: Suite) -> bool:
        return suite.kem is self.kem and (suite.kdf, suite.aead) in self.algorithms


def encode_key_list(configs: Sequence[KeyConfig]) -> bytes:
    """The document `application/ohttp-keys`: each configuration after its length in two bytes."""
    encoded = [config.encode() for config in configs]
    return b"".join(len(one).to_bytes(2, "big") + one for one in encoded)


def parse_key_list(data: bytes) -> tuple[KeyConfig, ...]:
    """The configurations that this side can use, in the order of the document.

    It ignores configurations with an unknown KEM (RFC 9458 section 3.2). Raises InvalidMessage for a broken or empty document,
    MessageTooLarge, and UnsupportedSuite if this side can use nothing in it.
    """
    if len(data) > MAX_KEY_LIST:
        raise errors.MessageTooLarge(f"a list of keys has at most {MAX_KEY_LIST} bytes")
    configs = []
    unsupported: errors.UnsupportedSuite | None = None
    position = 0
    while position < len(data):
        start = position + 2
        position = start + int.from_bytes(data[position:start], "big")
        if start > len(data) or position > len(data):
            raise errors.InvalidMessage("the list of keys is cut short")
        try:
            configs.append(KeyConfig.parse(data[start:position]))
        except errors.UnsupportedSuite as error:
            unsupported = error
    if not configs:
        raise unsupported or errors.InvalidMessage("the list of keys is empty")
    return tuple(configs)


@dataclass(frozen=True, slots=True)
class SealedHeader:
    """The start of a sealed request: the key that it is sealed to, the algorithms, and the encapsulated key."""

    key_id: int
    suite: Suite
    enc: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read from the first bytes of a sealed request. Raises TruncatedStream or UnsupportedSuite."""
        if len(data) < _HEADER.size:
            raise errors.TruncatedStream("the sealed request ended inside its header")
        key_id, kem_id, kdf, aead = _HEADER.unpack_from(data)
        suite = _suite(kem_id, kdf, aead)
        end = _HEADER.size + suite.kem.n_enc
        if len(data) < end:
            raise errors.TruncatedStream("the sealed request ended inside its header")
        return cls(key_id, suite, bytes(data[_HEADER.size : end]))

    @property
    def identifiers(self) -> bytes:
        """`hdr`: the seven bytes that HPKE's `info` repeats (RFC 9458 section 4.3)."""
        return _HEADER.pack(self.key_id, self.suite.kem, self.suite.kdf, self.suite.aead)

    @property
    def raw(self) -> bytes:
        """`hdr ‖ enc`, as on the wire."""
        return self.identifiers + self.enc

    def room(self, size: int) -> int:
        """The most bytes of plaintext, padding included, in a sealed request of `size` bytes: without this header, and without
        the final chunk's mark and tag.
        """
        return max(0, size - _HEADER.size - len(self.enc) - 1 - framing.TAG)

    @property
    def digest(self) -> bytes:
        """SHA-256 of `hdr ‖ enc`. It names the request: every `enc` of HPKE is fresh. A grant is bound to it."""
        return hashlib.sha256(self.raw).digest()


def inspect_request(body: bytes) -> SealedHeader:
    """The header of a whole sealed request, after a walk over its chunks to the final one. Nothing is opened.

    Raises MessageTooLarge, UnsupportedSuite, InvalidMessage, and TruncatedStream if the body was cut short.
    """
    if len(body) > MAX_SEALED_REQUEST:
        raise errors.MessageTooLarge("a sealed request has at most 7 MiB")
    header = SealedHeader.parse(body)
    deframer = framing.Deframer(MAX_REQUEST_CHUNKS)
    deframer.feed(memoryview(body)[_HEADER.size + len(header.enc) :])
    deframer.close()
    return header


@cache
def _suite(kem_id: int, kdf: int, aead: int) -> Suite:
    """Of a sealed request. Only the suites that this side has are kept. Raises UnsupportedSuite."""
    kem = _kem(kem_id)
    if kdf not in _KDFS or aead not in _AEADS:
        raise errors.UnsupportedSuite("the sealed request uses a KDF or AEAD that this side does not have")
    return Suite(kem, Kdf(kdf), Aead(aead))


def _kem(kem_id: int) -> Kem:
    if kem_id not in _KEMS:
        raise errors.UnsupportedSuite("the KEM is not supported here; X25519 and MLKEM768-X25519 are")
    return Kem(kem_id)
