"""Links that sign a browser in once: `lacre admin open` asks for one with an access token, and a person opens it.

Rules:
- A link holds a random code and no token. It works once, for a minute, and only in the process that made it.
- Opening it shows for whom it is; the person then agrees. So a stranger's link signs nobody in unseen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lacre.jose.jws import b64u

LIVES: Final = 60.0  # seconds from the command to the browser
MAX_LINKS: Final = 64  # that wait to be opened


@dataclass(frozen=True, slots=True)
class LinkOffer:
    """A link that was not used yet. who: for whom it is."""

    token: str = field(repr=False)
    who: str
    until: float


class OpenLinks:
    """clock: seconds since the epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offers: dict[bytes, LinkOffer] = {}

    def make(self, token: str, who: str) -> str | None:
        """The code of a new link; None if too many wait."""
        now = self._clock()
        self._offers = {name: offer for name, offer in self._offers.items() if offer.until > now}
        if len(self._offers) >= MAX_LINKS:
            return None
        code = b64u(os.urandom(32))
        self._offers[_named(code)] = LinkOffer(token, who, now + LIVES)
        return code

    def look(self, code: str) -> LinkOffer | None:
        """The offer, which stays."""
        offer = self._offers.get(_named(code))
        return offer if offer is not None and offer.until > self._clock() else None

    def take(self, code: str) -> LinkOffer | None:
        """The offer, for the last time."""
        offer = self.look(code)
        self._offers.pop(_named(code), None)
        return offer


def _named(code: str) -> bytes:
    return hashlib.sha256(code.encode()).digest()
