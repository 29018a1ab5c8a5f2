"""Which host names a resolver accepts, which hosts are on this machine, and what messages show of a URL. No I/O."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

import httpx2

from lacre.errors import SettingsError

LOCALHOST: Final = "localhost"
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")  # RFC 1123 section 2.1, and `_` as in DNS
MAX_HOST: Final = 253  # characters of a name in DNS (RFC 1035 section 2.3.4)
# OpenSSL's errors for a certificate that is not valid now: X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED.
EXPIRED: Final = frozenset({9, 10})
# For one of another name: X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_EMAIL_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH.
OTHER_HOST: Final = frozenset({62, 63, 64})


def checked_host(host: str) -> str:
    """The host, if a resolver accepts it. Raises SettingsError.

    host: an IP address without brackets, or a name, in which characters beyond ASCII follow IDNA.
    """
    if ":" in host:
        return host
    try:
        name = httpx2.URL(scheme="http", host=host).raw_host.decode("ascii")
    except (httpx2.InvalidURL, UnicodeError, ValueError) as exc:
        raise SettingsError(_no_host(host)) from exc
    labels = name.removesuffix(".").split(".")
    if len(name) > MAX_HOST or not all(map(_LABEL.fullmatch, labels)):
        raise SettingsError(_no_host(host))
    return host


def _no_host(host: str) -> str:
    return f"{host[:64]!r} is not a host name: a name has letters, digits, dashes and dots, and 1 to 63 characters between dots"


def without_secrets(url: str) -> str:
    """A URL for messages: without user, password, query and fragment, any of which may be a secret."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "an unreadable address"
    if not parts.scheme or not host:
        return "an unreadable address"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}{parts.path}"


def is_loopback(host: str) -> bool:
    """Whether a host of a URL, without brackets, is on this machine: `localhost`, or an address that cannot leave it."""
    if host == LOCALHOST:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
