"""How the gateway refuses a request before the first byte of an answer: with a row of the fixed problem table. The only
additions are typed members of `lacre.problems.details`.
"""  # fmt: skip

from __future__ import annotations

import math
from collections.abc import Mapping

from lacre.errors import Details
from lacre.problems import MEDIA_TYPE, Problem
from lacre.problems.details import NONE

RawHeaders = list[tuple[bytes, bytes]]
NO_FACTS: Mapping[str, str] = {}


class Refusal(Exception):
    """Ends a request with a problem document. Raised anywhere on its path, answered at one place.

    retry_after: seconds, for 429 and 503. challenge: the value of WWW-Authenticate, for 401 (RFC 9110 section 11.6.1). details:
    members of the document beside its type. noted: the reason, for the log alone: in our own words, and nothing of a token or a
    body. facts: further fields for the log alone.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        retry_after: float | None = None,
        challenge: bytes | None = None,
        details: Details = NONE,
        noted: str = "",
        facts: Mapping[str, str] = NO_FACTS,
    ) -> None:
        super().__init__(problem.type)
        self.problem = problem
        self.retry_after = retry_after
        self.challenge = challenge
        self.details = details
        self.noted = noted
        self.facts = facts

    def said(self) -> dict[str, str]:
        """Fields for the log: the fault in fixed words. Of a token the claim and the reason, but no value."""
        told = {name: str(self.details[name]) for name in ("limit", "scope") if name in self.details}
        reason = self.noted or ": ".join(str(self.details[name]) for name in ("claim", "reason") if name in self.details)
        if not reason and "limit" in told:
            reason = f"limit: {told['limit']}"
        return {"problem": self.problem.slug, **({"reason": reason} if reason else {}), **told, **self.facts}

    def answer(self, request_id: str | None) -> tuple[RawHeaders, bytes]:
        """The headers and the problem document. request_id: by which the operator finds the reason in the log."""
        body = self.problem.body(self.details if request_id is None else {**self.details, "request_id": request_id})
        headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        if self.challenge is not None:
            headers.append((b"www-authenticate", self.challenge))
        return headers, body
