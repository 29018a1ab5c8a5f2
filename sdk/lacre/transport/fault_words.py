"""Why a connection of a server or a command failed, in words for its log: the cause, and the setting that helps.

`network_causes` is the same for the SDK's own connections, with what a caller can do. The rules there hold here too.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Final

import httpx2

from lacre.runtime.hosts import EXPIRED, OTHER_HOST
from lacre.transport.network_causes import NO_ROUTE, NOT_TLS, below

_RESET: Final = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


def fault_in_words(error: BaseException, trust: str = "SSL_CERT_FILE") -> str:
    """The cause of a failed connection, such as "nothing listens there".

    trust: the setting that names further CAs. Only the causes below `error` count, never its text: a peer may have written it.
    """
    for found in below(error):
        if isinstance(found, ssl.SSLError):
            return _tls(found, trust)
        if isinstance(found, socket.gaierror):
            return "its name cannot be resolved: check the host, and this machine's name server"
        if isinstance(found, ConnectionRefusedError):
            return "nothing listens there: check host and port, and that it runs"
        if isinstance(found, OSError) and found.errno in NO_ROUTE:
            return "there is no route from this machine: check the host and the network"
        if isinstance(found, OSError) and found.errno == errno.ENOENT:
            return "no such file or socket"
        if isinstance(found, _RESET):
            return "it broke the connection"
        if type(found).__module__.partition(".")[0] == "h11":
            return "it does not answer in HTTP: check the port"
    if isinstance(error, httpx2.ProxyError):
        return "the proxy does not connect to it: check the *_PROXY variables and NO_PROXY"
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "it does not answer in time: check the host and the port, and that no firewall is in the way"
    return f"the connection failed ({type(error).__name__})"


def _tls(error: ssl.SSLError, trust: str) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        if error.reason in NOT_TLS:
            return "it does not speak TLS on that port"
        return f"it and this machine cannot agree on TLS ({error.reason or 'no reason given'})"
    if error.verify_code in EXPIRED:
        return "its certificate is not valid now: renew it on that server, or correct this machine's clock"
    if error.verify_code in OTHER_HOST:
        return "its certificate is for another host: use a name of the certificate, or issue one for this name"
    return f"its certificate is not signed by a trusted CA: set {trust} to the CA that signed it"
