"""What a worker can link: how long requests of one client have the same salt, and the same clock correction."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Final

MAX_CORRECTION: Final = 30 * 86400.0  # seconds; with a clock further off, the manifest would not have verified


@dataclass(slots=True)
class Scope:
    """How workers see this client for a while: the salt of its prefix cache, and a clock correction from one of them.

    Both end together: a correction that outlived its salt would link it to the next salt. RFC 9458 section 6.5.2 wants the
    correction short-lived. since, offset: seconds, by this machine's clock.
    """

    since: float
    salt: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    offset: float = 0.0

    def salt_of(self, cache_scope: str | None) -> str:
        """The salt of one of the program's users, who cannot be told from it; the client's own if there is none.

        Derived (HMAC-SHA-256) and not kept: a server may have any number of users.
        """
        if cache_scope is None:
            return self.salt
        derived = hmac.new(bytes.fromhex(self.salt), cache_scope.encode(), hashlib.sha256)
        return derived.hexdigest()[: len(self.salt)]

    def correct(self, date: str, now: float) -> bool:
        """Whether this is a usable date of a worker. The correction holds in this scope, and in no later one.

        now: seconds since the epoch, by this machine's clock.
        """
        try:
            offset = parsedate_to_datetime(date).timestamp() - now
        except (ValueError, OverflowError):  # OverflowError: for numbers that no date can hold
            return False
        if abs(offset) > MAX_CORRECTION:
            return False
        self.offset = offset
        return True
