"""Which `Host` values mean a server on this machine (RFC 9110 section 7.2), which `Origin` values are allowed, and the base URL
that a server prints. No I/O.

Rules:
- By DNS rebinding, a web page can point its own name at this machine's address. So only names that were allowed are accepted.
- A page cannot do that with an address: a browser that sends an address asked for it. So every loopback address is accepted,
  and if the server listens on all addresses, every address.
- The port must match too: the server's port, and 80 if none is written.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lacre.errors import SettingsError
from lacre.runtime.hosts import LOCALHOST

HTTP: Final = 80  # the port of an http URL that names none
_AUTHORITY: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(:(?P<port>[0-9]{1,5})?)?")
_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,253})(:(?P<port>[0-9]{1,5}))?/?"
)
_UNWRITTEN: Final = {"http": str(HTTP), "https": "443"}  # browsers omit these ports from an origin
NO_PAGE: Final = "null"  # the origin of a page that comes from no server (RFC 6454 section 7.1)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Hosts:
    """port: the server's. names: accepted names, beside loopback's addresses. pairs: names with their own port, such as a
    tunnel's. everywhere: whether every address is accepted.
    """

    port: int
    names: frozenset[str] = frozenset({LOCALHOST})
    pairs: frozenset[tuple[str, int]] = frozenset()
    everywhere: bool = False

    @classmethod
    def of(cls, listening: str, port: int, allowed: Sequence[str] = ()) -> Hosts:
        """listening: the socket's address or name. allowed: other names of this machine, with or without a port.

        Raises SettingsError for text that is not a host.
        """
        address = _address(listening)
        everywhere = address is not None and address.is_unspecified
        names, pairs = {LOCALHOST} if everywhere else {LOCALHOST, shown(listening)}, set()
        for text in allowed:
            found = _split(text)
            if found is None:
                raise SettingsError(f"{text!r} is not a host: write a name as in a URL, such as box.lan")
            name, own = found
            if own is None:
                names.add(name)
            else:
                pairs.add((name, own))
        return cls(port, frozenset(names), frozenset(pairs), everywhere)

    def know(self, host: str) -> bool:
        """Whether a value of `Host` is this server's. Letter case, a final dot and an address's form make no difference."""
        found = _split(host)
        if found is None:
            return False
        name, port = found[0], HTTP if found[1] is None else found[1]
        if (name, port) in self.pairs:
            return True
        address = _address(name)
        here = name in self.names or (address is not None and (self.everywhere or address.is_loopback))
        return here and port == self.port

    def __str__(self) -> str:
        """For a person: what to write into a base URL."""
        known = [f"{name}:{self.port}" for name in sorted(self.names)] + [f"{name}:{port}" for name, port in sorted(self.pairs)]
        return f"{', '.join(known)}, and {'every' if self.everywhere else 'a loopback'} address with port {self.port}"


def base_url(listening: str, port: int) -> str:
    """Where a program on this machine finds a server. A server on all addresses is found on loopback."""
    address = _address(listening)
    if address is not None and address.is_unspecified:
        listening = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://{shown(listening)}:{port}/v1"


def as_origin(text: str) -> str:
    """A web page's origin as browsers send it (RFC 6454 section 6.2). A default port, a slash at the end and letter case make
    no difference. Raises SettingsError for a text that no browser sends.
    """
    if text == NO_PAGE:
        return text
    found = _ORIGIN.fullmatch(text.strip().lower())
    if found is None or (found["host"].startswith("[") and _address(found["host"]) is None):
        raise SettingsError(
            f"{text!r} is not the origin of a web page: write its scheme, host and port, such as http://localhost:3000"
        )
    port = found["port"]
    written = "" if port is None or port == _UNWRITTEN.get(found["scheme"]) else f":{port}"
    return f"{found['scheme']}://{found['host']}{written}"


def shown(host: str) -> str:
    """The normal form of a name or an address in a URL. An IPv6 scope is dropped: it has a meaning only on its own machine."""
    address = _address(host)
    if address is None:
        return host.lower().removesuffix(".")
    return f"[{str(address).partition('%')[0]}]" if address.version == 6 else str(address)


def _split(text: str) -> tuple[str, int | None] | None:
    """Host and port of `host[:port]` (RFC 3986 section 3.2.2), the host in its normal form; None for other text."""
    found = _AUTHORITY.fullmatch(text.strip(" \t"))
    if found is None or (found["host"].startswith("[") and _address(found["host"]) is None):
        return None
    return shown(found["host"]), int(found["port"]) if found["port"] else None


def _address(host: str) -> Address | None:
    """The address that a text is, in brackets or not; None for a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
