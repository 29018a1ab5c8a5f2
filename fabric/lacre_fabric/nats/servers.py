"""The NATS servers' addresses, and how a client verifies the servers.

Rules:
- All addresses begin with `tls://`, or none does: a client that switches servers must not fall back to plain text.
- A server's certificate is always verified: by the CA of the settings or else the system's, and for the name or address in its
  URL. No setting disables this.
- The files are watched: each connection, also a reconnection, uses the newest ones that can be used.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import nats.errors
import structlog

from lacre.errors import SettingsError
from lacre.runtime.authorities import trusting
from lacre.runtime.hosts import EXPIRED, OTHER_HOST
from lacre.runtime.watched_files import WatchedFiles

_TLS: Final = "tls://"

log = structlog.get_logger("lacre.fabric")

Trust = WatchedFiles[ssl.SSLContext | None]


class NoTls(nats.errors.Error):
    """A server was called with `tls://` and says that it does not use TLS."""


class HungUp(nats.errors.Error):
    """A server closed the connection instead of answering the credential."""

    def __str__(self) -> str:
        return "it closed the connection: check its log, and whether it requires a client certificate (nats.certificate)"


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of one cluster; any of them will do. ca, certificate, key: PEM files; the last two if servers require
    them.
    """

    urls: tuple[str, ...]
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, servers: Servers | str) -> Servers:
        return cls((servers,)) if isinstance(servers, str) else servers

    @property
    def tls(self) -> bool:
        return all(url.startswith(_TLS) for url in self.urls)

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(urlsplit(url).hostname or "" for url in self.urls)

    def context(self) -> ssl.SSLContext | None:
        """None without TLS. Raises SettingsError."""
        if not self.tls:
            return None
        context = ssl.create_default_context() if self.ca is None else trusting(self.ca, "nats.ca")
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.key)
            except OSError as exc:  # also ssl.SSLError, for a file that is not PEM or a key that does not match
                names = f"{self.certificate}, {self.key}"
                raise SettingsError(f"nats: cannot use {names}: give PEM files, with the key of the certificate") from exc
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def trust(self) -> Trust:
        """What `context` makes of the files, and of those that replace them. Raises SettingsError."""
        files = [file for file in (self.ca, self.certificate, self.key) if file is not None and self.tls]
        return WatchedFiles(files, self.context, partial(_told, ", ".join(self.hosts)))


def _told(host: str, reason: str | None) -> None:
    if reason is None:
        log.info("fabric.certificates_taken", host=host)
    else:
        log.error("fabric.certificates_refused", host=host, reason=reason, remedy="the last good ones stay in use")


def distrusted(error: BaseException | None) -> str | None:
    """Why the server is not trusted, and what to do; None if `error` has another cause."""
    if isinstance(error, NoTls):
        return "it does not use TLS: configure `tls` on that server"
    if not isinstance(error, ssl.SSLError):
        return None
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS failed ({error.reason or 'cut off'}): does the server require a client certificate (nats.certificate)?"
    if error.verify_code in EXPIRED:
        return "its certificate is not valid now: renew it on the server, or correct this machine's clock"
    if error.verify_code in OTHER_HOST:
        return "its certificate is for another host: use one of its names in nats.url, or issue one for this name"
    return "its certificate is not signed by a trusted CA: set nats.ca to the CA that signed it"
