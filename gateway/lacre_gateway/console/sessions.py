"""Who is signed in: a sealed cookie that holds the access token, so that each page is judged as a call with that token.

Rules:
- The key is random and lives as long as the process. A cookie of an earlier process, or of another one, opens nothing.
- Each sign-in makes a new session, so a session that someone planted before is not continued.
- A session ends with its token, after the settings' time, or by signing out. An ended one is remembered until it would end.
- A cookie that is sealed for one purpose opens for no other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lacre.errors import InvalidMessage
from lacre.jose.jws import b64u, b64u_decode

MAX_COOKIE: Final = 4000  # bytes of one cookie: browsers drop longer ones without a word
MAX_ENDED: Final = 10_000  # sessions that were signed out and could still open; a new one waits until the oldest ends by itself
MAX_SPENT: Final = 2_000  # sign-ins that are remembered as used
_NONCE: Final = 12
_SESSION: Final = b"lacre console session 1"
_FLOW: Final = b"lacre console sign-in 1"
FLOW_LIVES: Final = 600.0  # seconds that a person has to sign in at the issuer


class CookieTooLong(InvalidMessage):
    """The access token is too long for a cookie."""


@dataclass(frozen=True, slots=True)
class Session:
    """until, fresh: seconds since the epoch, until when it holds, and until when it may make changes."""

    id: str
    token: str = field(repr=False)
    until: float
    fresh: float


@dataclass(frozen=True, slots=True)
class Flow:
    """A sign-in under way (OpenID Connect Core 1.0 section 3.1; RFC 7636). back: the page to return to."""

    state: str
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)
    back: str
    until: float
    again: bool = False


class Sessions:
    """secure: whether the console is served over TLS. instance: of the gateway, because all ports of a host share cookies."""

    def __init__(self, *, secure: bool, instance: str, clock: Callable[[], float]) -> None:
        own = hashlib.sha256(instance.encode()).hexdigest()[:8]
        prefix = "__Host-" if secure else ""
        self.name, self.flow_name = f"{prefix}lacre-console-{own}", f"{prefix}lacre-sign-in-{own}"
        self._secure = secure
        self._clock = clock
        self._aead = AESGCM(AESGCM.generate_key(256))
        self._csrf = os.urandom(32)
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._spent: OrderedDict[str, float] = OrderedDict()

    def begin(self, token: str, until: float, fresh: float) -> tuple[Session, str]:
        """A new session, and the header that gives it to the browser. Raises CookieTooLong."""
        session = Session(b64u(os.urandom(16)), token, until, fresh)
        sealed = self._seal(_SESSION, {"id": session.id, "token": token, "until": until, "fresh": fresh})
        return session, self._cookie(self.name, sealed, until - self._clock())

    def find(self, cookies: Mapping[str, str]) -> Session | None:
        """The session of a request; None if there is none that holds."""
        members = self._open(_SESSION, cookies.get(self.name))
        if members is None or members["until"] <= self._clock() or members["id"] in self._ended:
            return None
        return Session(members["id"], members["token"], members["until"], members["fresh"])

    def end(self, session: Session) -> str:
        """Ends it for good. Returns the header that takes it from the browser."""
        self._forget_past(self._ended)
        if len(self._ended) >= MAX_ENDED:
            raise InvalidMessage("too many sign-outs at once: wait until the oldest sessions have ended")
        self._ended[session.id] = session.until
        return self.forget()

    def forget(self) -> str:
        return self._cookie(self.name, "", 0)

    def csrf(self, session: Session) -> str:
        """The token that forms of this session carry."""
        return b64u(hmac.digest(self._csrf, session.id.encode(), "sha256"))

    def begin_flow(self, back: str, *, again: bool) -> tuple[Flow, str]:
        """A new sign-in, and its header. again: the person must prove to be there."""
        state, nonce, verifier = (b64u(os.urandom(32)) for _ in range(3))
        until = self._clock() + FLOW_LIVES
        sealed = self._seal(
            _FLOW, {"state": state, "nonce": nonce, "verifier": verifier, "back": back, "until": until, "again": again}
        )
        return Flow(state, nonce, verifier, back, until, again), self._cookie(self.flow_name, sealed, FLOW_LIVES)

    def take_flow(self, cookies: Mapping[str, str], state: str) -> Flow | None:
        """The sign-in that this browser began with this state, once; None if there is none."""
        members = self._open(_FLOW, cookies.get(self.flow_name))
        if members is None or members["until"] <= self._clock() or members["state"] in self._spent:
            return None
        if not hmac.compare_digest(members["state"].encode(), state.encode()):
            return None
        self._spend(members["state"], members["until"])
        return Flow(**members)

    def forget_flow(self) -> str:
        return self._cookie(self.flow_name, "", 0)

    def _spend(self, state: str, until: float) -> None:
        """Strangers can begin sign-ins too, and must not keep others from theirs. So the oldest goes if there are too many: the
        issuer takes no code a second time (RFC 6749 section 4.1.2).
        """
        self._forget_past(self._spent)
        if len(self._spent) >= MAX_SPENT:
            self._spent.popitem(last=False)
        self._spent[state] = until

    def _forget_past(self, known: OrderedDict[str, float]) -> None:
        now = self._clock()
        for old in [each for each, ends in known.items() if ends <= now]:
            del known[old]

    def _seal(self, purpose: bytes, members: Mapping[str, object]) -> str:
        nonce = os.urandom(_NONCE)
        text = zlib.compress(json.dumps(members).encode(), 9)
        sealed = b64u(nonce + self._aead.encrypt(nonce, text, purpose))
        if len(sealed) > MAX_COOKIE:
            raise CookieTooLong(f"the access token needs a cookie of {len(sealed)} bytes; browsers keep {MAX_COOKIE}")
        return sealed

    def _open(self, purpose: bytes, sealed: str | None) -> dict[str, Any] | None:
        """None if this process did not seal it for this purpose."""
        if not sealed or len(sealed) > MAX_COOKIE:
            return None
        try:
            data = b64u_decode(sealed)
            text = self._aead.decrypt(data[:_NONCE], data[_NONCE:], purpose)
        except (InvalidTag, InvalidMessage, ValueError):
            return None
        members: dict[str, Any] = json.loads(zlib.decompress(text))  # bytes of our own
        return members

    def _cookie(self, name: str, value: str, seconds: float) -> str:
        secure = "; Secure" if self._secure else ""
        return f"{name}={value}; Path=/; Max-Age={max(0, int(seconds))}; HttpOnly; SameSite=Lax{secure}"
