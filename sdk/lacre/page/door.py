"""Who may use the chat page: the browser that opened its one-time link.

Rules:
- A link works once and for ten minutes. It is exchanged for a cookie that no script reads and that no other site sends.
- Browsers send a cookie of 127.0.0.1 to every port there. A server of another user could receive it. So each session also has a
  *half* that the page gets once and keeps in storage of its own origin, port included. The API needs both.
- `Host` must be the page's own: by DNS rebinding, another page can use its own name for this address.
- A request that changes something must have the page's own `Origin`. Another page's `Origin` or `Sec-Fetch-Site` is refused.
- Only digests of secrets are kept, compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from lacre.errors import LacreError

LINK_LIFE: Final = 600.0  # seconds: a person opens a link at once
SESSION_LIFE: Final = 7 * 86400  # seconds; the proxy forgets all sessions when it ends
MAX_SESSIONS: Final = 8  # browsers of one person
MAX_LINKS: Final = 8  # unused links; the oldest goes first
MAX_COOKIES: Final = 64  # pairs read of one request
HALF: Final = "lacre-page"  # the header with the session's second secret
_SAFE: Final = frozenset({"GET", "HEAD"})
_HERE: Final = frozenset({"same-origin", "none"})  # none: the person typed the address, or opened a bookmark


class ClosedDoor(LacreError):
    """The door stays closed. code: for the page; the text is for a person and names what helps."""

    remedy = "Open the chat page by a new link."

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code


@dataclass(slots=True)
class _Session:
    cookie: bytes
    born: float
    half: bytes | None = None  # None until the page has fetched it


@dataclass(slots=True)
class PageDoor:
    """origin: the page's own, such as `http://127.0.0.1:11435`. entered: called when a link was used."""

    origin: str
    entered: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic
    _links: dict[bytes, float] = field(default_factory=dict, repr=False)
    _used: list[bytes] = field(default_factory=list, repr=False)
    _sessions: list[_Session] = field(default_factory=list, repr=False)

    @property
    def cookie(self) -> str:
        """The cookie's name. It has the port, so that several proxies do not overwrite each other's."""
        return f"lacre-page-{urlsplit(self.origin).port}"

    def link(self) -> str:
        """A new one-time link."""
        key = secrets.token_urlsafe(32)
        self._links[_digest(key)] = self.clock()
        while len(self._links) > MAX_LINKS:
            del self._links[next(iter(self._links))]
        return f"{self.origin}/?key={key}"

    def exchange(self, key: str) -> str:
        """The value of `Set-Cookie` for a link's key, which this uses up. Raises ClosedDoor."""
        made = self.spend(key)
        if made is None:
            used = any(hmac.compare_digest(each, _digest(key)) for each in self._used)
            raise ClosedDoor(410 if used else 403, "link_used" if used else "link_unknown", USED_LINK if used else UNKNOWN_LINK)
        if self.clock() - made > LINK_LIFE:
            raise ClosedDoor(410, "link_expired", EXPIRED_LINK)
        self.entered()
        cookie = secrets.token_urlsafe(32)
        self._sessions = [*self._sessions[1 - MAX_SESSIONS :], _Session(_digest(cookie), self.clock())]
        return f"{self.cookie}={cookie}; Path=/; Max-Age={SESSION_LIFE}; HttpOnly; SameSite=Strict"

    def spend(self, key: str) -> float | None:
        """Uses up a link, and returns when it was made. None: there is no such link, or it was used."""
        digest = _digest(key)
        made = next((self._links.pop(each) for each in list(self._links) if hmac.compare_digest(each, digest)), None)
        if made is not None:
            self._used = [*self._used[1 - MAX_LINKS :], digest]
        return made

    def knows(self, headers: Headers) -> bool:
        """Whether the request has a session's cookie."""
        return self._session(headers) is not None

    def claim(self, headers: Headers) -> str:
        """The session's half, which leaves this process once. Raises ClosedDoor."""
        session = self._session(headers)
        if session is None:
            raise ClosedDoor(401, "no_session", NO_SESSION)
        if session.half is not None:
            raise ClosedDoor(409, "claimed", CLAIMED)
        half = secrets.token_urlsafe(32)
        session.half = _digest(half)
        return half

    def check_host(self, headers: Headers) -> None:
        """Raises ClosedDoor for a request that names another host."""
        if headers.getlist("host") != [urlsplit(self.origin).netloc]:
            raise ClosedDoor(421, "host", f"The chat page only answers at {self.origin}: open it there.")

    def check_opening(self, headers: Headers) -> None:
        """Of the document: a link elsewhere may lead here. Raises ClosedDoor for anything but a person's opening it.

        A browser that loads a page ahead of time must not use up its link.
        """
        self.check_host(headers)
        kinds, ahead = headers.getlist("sec-fetch-dest"), headers.getlist("sec-purpose") + headers.getlist("purpose")
        if any(kind != "document" for kind in kinds) or any(origin != self.origin for origin in headers.getlist("origin")):
            raise ClosedDoor(403, "origin", "Another page tried to load this one: open it by itself.")
        if ahead:
            raise ClosedDoor(403, "ahead", "Open this page instead of loading it ahead of time.")

    def check_origin(self, headers: Headers, method: str) -> None:
        """Of everything that the page loads or asks. Raises ClosedDoor for a request that comes from another page."""
        self.check_host(headers)
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        foreign = any(origin != self.origin for origin in origins) or any(site not in _HERE for site in sites)
        if foreign or len(origins) > 1 or (method not in _SAFE and not origins):
            raise ClosedDoor(403, "origin", f"Only the chat page at {self.origin} may ask this.")

    def check_session(self, headers: Headers) -> None:
        """Raises ClosedDoor unless the request has a session's cookie and its half."""
        session, halves = self._session(headers), headers.getlist(HALF)
        if session is None:
            raise ClosedDoor(401, "no_session", NO_SESSION)
        if session.half is None or len(halves) != 1 or not hmac.compare_digest(session.half, _digest(halves[0])):
            raise ClosedDoor(401, "no_half", CLAIMED)

    def _session(self, headers: Headers) -> _Session | None:
        now = self.clock()
        self._sessions = [each for each in self._sessions if now - each.born <= SESSION_LIFE]
        pairs = [pair.strip().partition("=") for line in headers.getlist("cookie") for pair in line.split(";", MAX_COOKIES)]
        sent = [_digest(value) for name, _, value in pairs[:MAX_COOKIES] if name == self.cookie]
        return next((each for each in self._sessions for one in sent if hmac.compare_digest(each.cookie, one)), None)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


_NEW: Final = "Start `lacre proxy --open` again for a new link. A browser that is in already can make one, in Settings."
USED_LINK: Final = f"This link was used before, and each link works once. {_NEW}"
EXPIRED_LINK: Final = f"This link is older than ten minutes. {_NEW}"
UNKNOWN_LINK: Final = f"This proxy did not make this link. {_NEW}"
NO_SESSION: Final = f"This browser has not opened the page's link. {_NEW}"
CLAIMED: Final = f"Another window or program took this session, or the browser lost its part of it. {_NEW}"
