"""The gateway's own certificate: read from the settings' files, and replaced while it serves.

Rules:
- A new certificate gets a TLS context of its own. The context in use never changes, so a half-written pair cannot damage it.
- A connection keeps the certificate of its handshake.
- A certificate that is not valid now does not replace one that is.
"""

from __future__ import annotations

import shlex
import ssl
import stat
from datetime import UTC, datetime
from functools import partial
from typing import Final

from cryptography import x509

from lacre.errors import SettingsError
from lacre.runtime.watched_files import WatchedFiles
from lacre_fabric.logs import Log
from lacre_gateway.settings import Tls

Certificate = WatchedFiles[ssl.SSLContext]
_TIME: Final = "%Y-%m-%d %H:%M UTC"


def tls_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or newer, with the certificate that is in the files now. Raises SettingsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        if stat.S_IMODE(tls.key.stat().st_mode) & stat.S_IRWXO:
            raise SettingsError(f"listen.tls.key: {tls.key} can be read by every user: chmod 600 {shlex.quote(str(tls.key))}")
        # Without a callback OpenSSL would ask the terminal for the password of an encrypted key, and wait.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        reason = exc.strerror if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError) else _NO_PAIR
        raise SettingsError(
            f"listen.tls: cannot use {tls.certificate} with {tls.key} ({reason}): write the certificate's chain and its key"
        ) from exc
    return context


_NO_PAIR: Final = "they are not PEM files of one key pair"


def watched(tls: Tls, log: Log) -> Certificate:
    """The context for new connections, kept current by `look`. Raises SettingsError."""
    return WatchedFiles([tls.certificate, tls.key], _Renewing(tls), partial(_told, log))


class _Renewing:
    """Reads the files; after the first time, only for a certificate that may replace the one before."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._valid: tuple[datetime, datetime] | None = None

    def __call__(self) -> ssl.SSLContext:
        context, (since, until) = tls_context(self._tls), _validity(self._tls)
        now = datetime.now(UTC)
        if self._valid is not None and self._valid[0] <= now < self._valid[1] and not since <= now < until:
            told = f"it is valid from {since:{_TIME}} to {until:{_TIME}}"
            raise SettingsError(f"listen.tls: {self._tls.certificate} is not valid now ({told}): renew it, or set the clock")
        self._valid = since, until
        return context


def _validity(tls: Tls) -> tuple[datetime, datetime]:
    """From when and until when the certificate is valid. Raises SettingsError."""
    try:
        own = x509.load_pem_x509_certificates(tls.certificate.read_bytes())[0]
    except (OSError, ValueError) as exc:
        raise SettingsError(f"listen.tls.certificate: cannot read {tls.certificate}: write it in PEM before its chain") from exc
    return own.not_valid_before_utc, own.not_valid_after_utc


def _told(log: Log, reason: str | None) -> None:
    if reason is None:
        log.info("certificate taken")
    else:
        log.error("certificate refused, the last good one stays", reason=reason)
