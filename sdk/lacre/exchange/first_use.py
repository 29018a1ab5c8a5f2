"""Runs once, when a client is made, everything that libraries do at their first use: they load code and make tables.

If another thread forks in the middle of that, the child has it half done and would wait for it forever. So a fork waits until
it is done (`lacre.runtime.forks.Undivided`).
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lacre.errors import LacreError
from lacre.runtime.forks import Undivided
from lacre.wire import varint
from lacre.wire.header import PREFERRED_AEADS, Kdf, Kem, KeyConfig, Suite
from lacre.wire.ohttp import response_nonce_length, seal_request

# Points that are valid, and the keys of no one: X25519's base point, and an ML-KEM key of zeros before it.
_X25519: Final = b"\x09" + bytes(31)
_NOBODYS: Final = {Kem.X25519: _X25519, Kem.XWING: bytes(1184) + _X25519}
# for host names, streams and the manifest store
_LOADED: Final = ("encodings.idna", "encodings.utf_8_sig", "filelock", "stringprep")


def _seal_and_open() -> None:
    for kem, key in _NOBODYS.items():
        for aead in PREFERRED_AEADS:
            suite = Suite(kem, Kdf.HKDF_SHA256, aead)
            _, _, opener = seal_request(KeyConfig(0, kem, key), b"", suite)
            with contextlib.suppress(LacreError):  # this is no answer, but the attempt loads all that an answer needs
                opener.feed(bytes(response_nonce_length(suite)) + varint.encode(32) + bytes(32))


def _verify() -> None:
    with contextlib.suppress(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(bytes(31) + b"\x01").verify(bytes(64), b"")


def _all() -> None:
    for name in _LOADED:
        with contextlib.suppress(ImportError):  # the code that needs it reports that it is missing
            importlib.import_module(name)
    _seal_and_open()
    _verify()


first_use: Final = Undivided(_all)
