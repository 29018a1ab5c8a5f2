"""Why a connection could not be made, or broke: names the cause behind an exception of httpx2's.

Rules:
- The cause comes from the chain of exceptions below httpx2's: the operating system's and TLS's. It is not guessed from text.
- A peer's text (a reason phrase, a certificate's names) is not repeated, except OpenSSL's verdict on a certificate.
- Addresses are shown, because they are what must be corrected; a proxy's user and password are not.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import httpx2

from lacre.errors import Cause
from lacre.runtime.hosts import EXPIRED, OTHER_HOST
from lacre.transport.dialled import DIALLED, Dialled

# OpenSSL's words for bytes that are not TLS at all.
NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"})
NO_ROUTE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})
_STATUS: Final = re.compile(r"[1-5][0-9]{2}\b")
_VARIABLES: Final = {"https": "HTTPS_PROXY or ALL_PROXY", "http": "HTTP_PROXY or ALL_PROXY"}
_MOST_CHAINED: Final = 32  # exceptions to look at; a chain has some six


@dataclass(frozen=True, slots=True)
class Why:
    """cause: of `NetworkError`. said: what happened. helps: what to do about it."""

    cause: Cause
    said: str
    helps: str


@dataclass(frozen=True, slots=True)
class Peer:
    """The peer. who: in words. setting: where its address comes from. url: of the request, if known. proxy: its address, as
    HOST:PORT, if one was used.
    """  # fmt: skip

    who: str
    setting: str
    url: httpx2.URL | None
    proxy: str | None

    @classmethod
    def of(cls, exc: httpx2.TransportError, who: str, setting: str) -> Peer:
        try:
            request = exc.request
        except RuntimeError:  # it has none
            return cls(who, setting, None, None)
        dialled = request.extensions.get(DIALLED)
        to = dialled.to if isinstance(dialled, Dialled) else None
        elsewhere = to is not None and to != (_host(request.url), _port(request.url))
        return cls(who, setting, request.url, f"{to[0]}:{to[1]}" if to is not None and elsewhere else None)

    @property
    def named(self) -> str:
        return self.who if self.url is None else f"{self.who} at {_host(self.url)}:{_port(self.url)}"

    @property
    def scheme(self) -> str:
        return "" if self.url is None else self.url.scheme


def explained(exc: httpx2.TransportError, who: str, setting: str) -> Why:
    """who: the peer, in words. setting: where its address comes from."""
    peer = Peer.of(exc, who, setting)
    return _late(exc, peer) if isinstance(exc, httpx2.TimeoutException) else _why(exc, peer)


def _late(exc: httpx2.TimeoutException, peer: Peer) -> Why:
    """A time limit passed."""
    if isinstance(exc, httpx2.PoolTimeout):
        return Why(
            "busy",
            f"all connections of this client are in use, and none became free{_within(exc, 'pool')}",
            "Read or close the streams that are open, or allow more with `limits=httpx2.Limits(max_connections=...)`.",
        )
    if isinstance(exc, httpx2.ConnectTimeout):
        if peer.proxy is not None:
            return _of_proxy(peer, f"did not answer{_within(exc, 'connect')}")
        return Why(
            "timeout",
            f"no connection to {peer.named} could be made{_within(exc, 'connect')}",
            f"Check the host and the port in {peer.setting}, and that no firewall is in the way; then try again.",
        )
    if isinstance(exc, httpx2.WriteTimeout):
        said = f"{peer.named} did not take the request{_within(exc, 'write')}"
    else:
        said = f"{peer.named} did not answer{_within(exc, 'read')}"
    return Why("timeout", said, "Try again, or set a longer `timeout=...`: a queue and a long prompt take time.")


def _why(exc: httpx2.TransportError, peer: Peer) -> Why:
    """For every other error."""
    chain = list(below(exc))
    for found in chain:
        if isinstance(found, ssl.SSLError):
            return _tls(found, peer)
    if isinstance(exc, httpx2.ProxyError):
        status = _STATUS.match(str(exc))
        told = f"refused to connect (status {status[0]})" if status else "refused to connect"
        return _of_proxy(peer, told + (", because it requires a user and a password" if status and status[0] == "407" else ""))
    if isinstance(exc, httpx2.ConnectError):
        return _unconnected(chain, peer)
    plain = " If that port requires TLS, write lacre:// instead of lacre+http://." if peer.scheme == "http" else ""
    if any(type(found).__module__.partition(".")[0] == "h11" for found in chain):  # h11 could not read the peer's bytes
        return Why(
            "not-http",
            f"{peer.named} does not answer in HTTP: something else listens there",
            f"Check the port in {peer.setting}.{plain}",
        )
    return Why(
        "broken",
        f"the connection to {peer.named} broke before an answer arrived",
        f"Try again. If it fails again, check that {peer.who} runs and that the port in {peer.setting} is its own.{plain}",
    )


def _unconnected(chain: list[BaseException], peer: Peer) -> Why:
    for found in chain:
        if isinstance(found, socket.gaierror):
            if peer.proxy is not None:
                return _of_proxy(peer, "has a name that cannot be resolved")
            return Why(
                "name",
                f"the name of {peer.named} cannot be resolved",
                f"Check the host in {peer.setting}, and that this machine's name server answers.",
            )
        if isinstance(found, ConnectionRefusedError):
            if peer.proxy is not None:
                return _of_proxy(peer, "does not run: nothing listens there")
            return Why(
                "refused",
                f"{peer.named} cannot be reached: nothing listens there",
                f"Check the host and the port in {peer.setting}, and that {peer.who} runs; then try again.",
            )
        if isinstance(found, OSError) and found.errno in NO_ROUTE:
            return Why(
                "route",
                f"{peer.named} cannot be reached: there is no route from this machine",
                f"Check the network of this machine, and the host in {peer.setting}.",
            )
    if peer.proxy is not None:
        return _of_proxy(peer, "cannot be reached")
    return Why(
        "other",
        f"{peer.named} cannot be reached",
        f"Check the address in {peer.setting}, and that {peer.who} runs; then try again.",
    )


def _tls(exc: ssl.SSLError, peer: Peer) -> Why:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return Why("certificate", f"the certificate of {peer.named} is not trusted: {exc.verify_message}", _trusting(exc, peer))
    if exc.reason in NOT_TLS:
        return Why(
            "not-tls",
            f"{peer.named} does not speak TLS on that port",
            f"Check the port in {peer.setting}. A gateway without TLS can be used only on this machine, as lacre+http://.",
        )
    return Why(
        "tls",
        f"{peer.named} and this machine cannot agree on TLS ({exc.reason or 'no reason given'})",
        "Ask the operator which TLS versions and certificates the gateway requires, or check the proxy before it.",
    )


def _trusting(exc: ssl.SSLCertVerificationError, peer: Peer) -> str:
    if exc.verify_code in EXPIRED:
        return "Set this machine's clock; if it is right, the operator must renew the certificate."
    if exc.verify_code in OTHER_HOST:
        return f"Use the host name that the certificate is for in {peer.setting}, or ask the operator for one with this name."
    return (
        "If it is from your own authority, name that with `verify=ssl.create_default_context(cafile=...)` or "
        "SSL_CERT_FILE. If not, do not trust this server."
    )


def _of_proxy(peer: Peer, said: str) -> Why:
    at = "" if peer.proxy is None else f" at {peer.proxy}"
    where = f"`proxy=...`, or {_VARIABLES.get(peer.scheme, 'HTTPS_PROXY, HTTP_PROXY or ALL_PROXY')}"
    return Why(
        "proxy",
        f"the proxy{at} {said}",
        f"Correct the proxy ({where}), or list the host of {peer.who} in NO_PROXY if none is needed.",
    )


def _within(exc: httpx2.TimeoutException, step: str) -> str:
    """The limit that passed."""
    try:
        limit = exc.request.extensions["timeout"][step]
    except (RuntimeError, KeyError, TypeError):
        return " in time"
    return f" within {limit:g} s" if isinstance(limit, int | float) else " in time"


def _host(url: httpx2.URL) -> str:
    return url.host


def _port(url: httpx2.URL) -> int:
    return url.port or {"https": 443, "http": 80}.get(url.scheme, 0)


def below(exc: BaseException) -> Iterator[BaseException]:
    """The exception and all below it, also those in groups."""
    waiting: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_CHAINED:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__context__, found.__cause__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions
