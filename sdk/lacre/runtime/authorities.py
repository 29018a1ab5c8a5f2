"""TLS contexts for clients that trust the certificate authorities of one file. Only the file is read here.

Rules:
- A file replaces the system's authorities for its own peer. Every other connection keeps them, so nothing here changes the
  environment (`SSL_CERT_FILE` would change it for all connections of the process).
- A file with one damaged certificate is refused whole: a half-written bundle must not silently trust fewer authorities.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError

MAX_FILE: Final = 4 * 2**20  # bytes; the bundle of a whole operating system is a quarter of a MiB


def trusting(ca: Path, place: str) -> ssl.SSLContext:
    """For a client that trusts the authorities of `ca` alone. place: the settings key. Raises SettingsError."""
    try:
        if reason := _unreadable(ca):
            raise SettingsError(f"{place}: cannot use {ca} ({reason}): name a PEM file with the certificate of the CA")
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError as exc:
        reason = (
            "it holds no certificate in PEM form"
            if exc.reason == "NO_CERTIFICATE_OR_CRL_FOUND"
            else "it is damaged or cut short"
        )
        raise SettingsError(f"{place}: cannot use {ca} ({reason}): write the whole certificate of the CA in PEM") from exc
    except OSError as exc:
        raise SettingsError(f"{place}: cannot use {ca} ({exc.strerror}): name a readable PEM file") from exc


def _unreadable(ca: Path) -> str:
    """Why it is no file of certificates, before OpenSSL reads it; empty if it may be one. Raises OSError."""
    size = ca.stat().st_size
    if not ca.is_file():
        return "it is not a file"
    return f"it is larger than {MAX_FILE} bytes" if size > MAX_FILE else ""
