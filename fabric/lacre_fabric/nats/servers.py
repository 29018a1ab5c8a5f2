"""Where the message servers are, and by what a client knows that it is them it speaks to.

Rules:
- Addresses begin with `tls://`, or none of them does: a client that goes on elsewhere must not go on in the clear.
- The certificate of a server is verified always: by the CA of the settings, else by those of the system, and for the name or
  the address by which it was called. There is no switch to leave that out.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import nats.errors

from lacre.errors import SettingsError

_TLS: Final = "tls://"
_EXPIRED: Final = frozenset({9, 10})  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_OTHER_HOST: Final = frozenset({62, 64})  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


class NoTls(nats.errors.Error):
    """A server that was called by `tls://` says that it wants none."""


class HungUp(nats.errors.Error):
    """A server ended the connection in place of an answer to the credential."""

    def __str__(self) -> str:
        return "it hung up: see its log, and whether it asks for a certificate (nats.certificate)"


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of one cluster, any of which will do. ca, certificate, key: PEM files; the latter two where servers ask."""

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
        """None where no TLS is spoken. Raises SettingsError."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as exc:  # and ssl.SSLError, for what is no PEM, or no pair
            names = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path is not None)
            raise SettingsError(f"nats: cannot use {names}: PEM files are wanted, the key that of the certificate") from exc
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def distrusted(error: BaseException | None) -> str | None:
    """Why a server is not believed to be who it should be, and what to do; None where that is not what `error` says."""
    if isinstance(error, NoTls):
        return "it speaks no TLS: configure `tls` on that server"
    if not isinstance(error, ssl.SSLError):
        return None
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS failed ({error.reason or 'cut off'}): see whether the server asks for a certificate (nats.certificate)"
    if error.verify_code in _EXPIRED:
        return "its certificate is not valid now: renew it on the server, or set this clock right"
    if error.verify_code in _OTHER_HOST:
        return "its certificate is for another host: use a name in nats.url that it has, or give the server one with this name"
    return "its certificate is by no CA that is trusted here: name the CA that signed it in nats.ca"
