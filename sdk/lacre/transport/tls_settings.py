"""Checks whether the connection to the gateway can be set up at all: proxies and certificates.

httpx2 reads proxies and certificate files from the environment when a client is made. A mistake there becomes a SettingsError
that names the variable. The value of a proxy variable is never shown: it may hold a password.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import httpx2

from lacre.errors import SettingsError

_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")  # in the order in which httpx2 and ssl look


@contextmanager
def settings_checked(verify: object = True, proxy: object = None) -> Iterator[None]:
    """Wrap around making a client: a wrong setting becomes a SettingsError. verify, proxy: the caller's values."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, httpx2.InvalidURL) as exc:
        raise SettingsError(_reason(exc, verify, proxy)) from None  # the text of the cause may hold a proxy's password


def _reason(error: Exception, verify: object, proxy: object) -> str:
    if proxy is not None and (why := _unusable(proxy)):
        return f"proxy: {why}"
    if isinstance(error, OSError):  # ssl's own errors are among these
        return _certificates(error, verify)
    for name in sorted(os.environ):
        if name.lower() in _PROXIES and os.environ[name] and (why := _unusable(os.environ[name])):
            return f"the environment variable {name}: {why}"
    return "the client cannot be made with these settings: check url, verify, proxy and limits, and the variables for proxies"


def _unusable(proxy: object) -> str:
    """Why a proxy cannot be used; empty if it can."""
    try:
        given = proxy if isinstance(proxy, httpx2.Proxy | httpx2.URL) else str(proxy)
        if isinstance(given, str) and "://" not in given:
            given = f"http://{given}"
        with httpx2.HTTPTransport(proxy=given if isinstance(given, httpx2.Proxy) else httpx2.Proxy(given), verify=False):
            return ""
    except ImportError:
        return "a SOCKS proxy needs another package: pip install 'httpx2[socks]', or name an http:// proxy"
    except (ValueError, TypeError, httpx2.InvalidURL):
        return "not the URL of a proxy: use http://HOST:PORT, https://, socks5:// or socks5h://, or unset it"


def _certificates(error: OSError, verify: object) -> str:
    why = error.strerror or "no certificates in it"
    if isinstance(error, ssl.SSLError):
        why = "it holds no certificate in PEM form"
    if isinstance(verify, str):
        return f"verify: {verify} cannot be used ({why}): name a file of certificates in PEM form, or pass an ssl.SSLContext"
    name = next((name for name in _CERTIFICATES if os.environ.get(name)), "")
    if name:
        return f"the environment variable {name}: {os.environ[name]} cannot be used ({why}): correct it, or unset it"
    return f"this system's certificates cannot be read ({why}): set SSL_CERT_FILE to a file of certificates in PEM form"
