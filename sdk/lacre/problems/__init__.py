"""What a gateway may say before a request is opened: a fixed table of problem types (RFC 9457).

A problem carries a type and a title from this table, and typed members of `lacre.problems.details`; never the text of an
exception. Workers name a problem by its type in an `error` frame. The gateway turns it into the HTTP response, and the SDK into
a typed error.

The table is in this file. Open `details.py` for the typed members.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lacre import errors
from lacre.errors import Details
from lacre.problems import details as members
from lacre.runtime.json_objects import object_in

MEDIA_TYPE: Final = "application/problem+json"
# Limits of concurrent requests, as gateways name them, and how a client can obey them.
_AT_ONCE: Final = frozenset({"concurrent_per_subject", "concurrent_streams"})
_FEWER_AT_ONCE: Final = (
    "Make the client with max_concurrency=N, where N is at most the limit: further requests then wait for their turn."
)
_OURS: Final = "urn:lacre:problem:"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row of the table. `status`: the outer HTTP status; `remedy`: what the caller should do next."""

    type: str
    status: int
    title: str
    remedy: str
    error: Callable[..., errors.RefusedError] = errors.RefusedError

    def body(self, details: Details = members.NONE) -> bytes:
        """The `application/problem+json` document."""
        said = {"type": self.type, "title": self.title, "status": self.status, **members.written(details)}
        return json.dumps(said, separators=(",", ":")).encode()

    @property
    def slug(self) -> str:
        """The last part of the type: a short name for logs and for `error.code`."""
        return re.split(r"[:#]", self.type)[-1]

    @staticmethod
    def type_in(body: bytes) -> str | None:
        """The `type` of a problem document; None if the bytes are not a problem document."""
        kind = (object_in(body) or {}).get("type")
        return kind if isinstance(kind, str) else None

    def exception(self, retry_after: float | None = None, details: Details = members.NONE) -> errors.RefusedError:
        later = f"The gateway accepts it again in {retry_after:g} s." if retry_after else ""
        said = " ".join(filter(None, (f"{self.title}.", members.told(details), later)))
        helps = _FEWER_AT_ONCE if details.get("limit") in _AT_ONCE else self.remedy
        refused = self.error(said, status=self.status, problem=self.type, retry_after=retry_after, remedy=helps)
        refused.details = dict(details)
        refused.add_note(helps)  # for tracebacks; `str` does not show it, because `remedy` does
        return refused


INVALID_TOKEN: Final = Problem(
    _OURS + "invalid-token", 401, "The access token is missing, invalid or expired",
    "Get a fresh token for this gateway's audience and try again.", errors.Unauthenticated)  # fmt: skip
UNUSABLE_CLAIMS: Final = Problem(
    _OURS + "unusable-claims", 401, "The access token is genuine, but one of its claims cannot be used",
    "Ask the issuer to correct the claim, or the operator to correct this issuer's settings; see docs/access.md.",
    errors.Unauthenticated)  # fmt: skip
CLAIMS_ELSEWHERE: Final = Problem(
    _OURS + "claims-elsewhere", 401, "The access token does not contain its groups or other claims: it refers to another place",
    "Ask the issuer to put them into the token, as fewer groups or as app roles; the operator finds help in docs/access.md.",
    errors.Unauthenticated)  # fmt: skip
INVALID_PROOF: Final = Problem(
    _OURS + "invalid-proof", 401, "The token is bound to a key, and the proof is missing, invalid or for another request",
    "Pass dpop=... with the key that the token is bound to, and set this machine's clock.", errors.Unauthenticated)  # fmt: skip
ISSUER_UNAVAILABLE: Final = Problem(
    _OURS + "issuer-unavailable", 503, "The gateway cannot get the keys of the token's issuer",
    "Try again after Retry-After; the operator's log says why.", errors.Unavailable)  # fmt: skip
FORBIDDEN: Final = Problem(
    _OURS + "forbidden", 403, "Policy does not allow this request",
    "Ask the operator for access to this pool, model or action.", errors.Forbidden)  # fmt: skip
TOO_MANY_TOKENS: Final = Problem(
    _OURS + "too-many-tokens", 403, "The request asks for more output tokens than policy allows",
    "Ask for fewer tokens: max_tokens counts for each of the `n` choices. Or ask the operator for a higher limit.",
    errors.Forbidden)  # fmt: skip
PATH_NOT_ALLOWED: Final = Problem(
    _OURS + "path-not-allowed", 403, "The path is not part of the model API, and policy does not allow this caller other paths",
    "Use one of the listed paths, exactly as written. For other paths, ask the operator for the action `http`.",
    errors.Forbidden)  # fmt: skip
INVALID_HEADERS: Final = Problem(
    _OURS + "invalid-headers", 400, "A Lacre-* header is missing or invalid", "Update the client.")  # fmt: skip
UNKNOWN_POOL: Final = Problem(
    _OURS + "unknown-pool", 404, "No such pool or model",
    "`lacre manifest show` lists the pools and their models.")  # fmt: skip
UNSUPPORTED_MEDIA_TYPE: Final = Problem(
    _OURS + "unsupported-media-type", 415, "The body is not a chunked sealed request",
    "Send message/ohttp-chunked-req; the gateway accepts nothing else.")  # fmt: skip
INVALID_REQUEST: Final = Problem(
    _OURS + "invalid-sealed-request", 400, "The sealed request is malformed, cut short or does not open",
    "Seal it again with the current key; if that fails too, update the client.")  # fmt: skip
TOO_LARGE: Final = Problem(
    _OURS + "too-large", 413, "The sealed request is too large", "Send at most 7 MiB.")  # fmt: skip
# RFC 9458 section 5.3 registers this type and asks for the status.
UNKNOWN_KEY: Final = Problem(
    "https://iana.org/assignments/http-problem-types#ohttp-key", 422, "The key configuration is not known here",
    "Fetch the manifest and seal the request again.")  # fmt: skip
INVALID_GRANT: Final = Problem(
    _OURS + "invalid-grant", 502, "The worker refused the gateway's grant",
    "The operator must publish a manifest with this gateway's key.")  # fmt: skip
REPLAYED: Final = Problem(
    _OURS + "replayed", 409, "This sealed request was seen before", "Seal a fresh one.")  # fmt: skip
RATE_LIMITED: Final = Problem(
    _OURS + "rate-limited", 429, "Too many requests", "Wait as long as Retry-After says.", errors.RateLimited)  # fmt: skip
BUDGET_SPENT: Final = Problem(
    _OURS + "budget-spent", 429, "A budget of this caller is used up",
    "Wait until its window ends, as Retry-After says, or ask the operator for another plan.", errors.RateLimited)  # fmt: skip
ABOVE_LIMIT: Final = Problem(
    _OURS + "above-limit", 403, "This request alone exceeds the caller's plan",
    "Ask for fewer tokens, or the operator for another plan.", errors.Forbidden)  # fmt: skip
UNKNOWN_PLAN: Final = Problem(
    _OURS + "unknown-plan", 403, "The access token names an unknown plan",
    "The operator must add the plan to plans.toml, or the issuer must name another plan.", errors.Forbidden)  # fmt: skip
BUDGET_UNAVAILABLE: Final = Problem(
    _OURS + "budget-unavailable", 503, "The gateway cannot reach the caller's budget",
    "Try again after Retry-After.", errors.Unavailable)  # fmt: skip
NO_WORKER: Final = Problem(
    _OURS + "no-worker", 503, "No worker of this pool serves this model now",
    "Try again after Retry-After; the operator can start one with `lacre worker`.", errors.Unavailable)  # fmt: skip
BUSY: Final = Problem(
    _OURS + "busy", 503, "Every worker is busy and the queue limit has passed",
    "Try again after Retry-After.", errors.Unavailable)  # fmt: skip
WORKER_LOST: Final = Problem(
    _OURS + "worker-lost", 502, "The worker was lost before it answered",
    "Seal a fresh request, but only once: this one may have run, and may be the reason why the worker was lost.",
    errors.Unavailable)  # fmt: skip
UNCLAIMED: Final = Problem(
    _OURS + "unclaimed", 502, "The worker was lost before it claimed the request",
    "Seal a fresh request, once: this one did not run, and no worker can claim it now.", errors.Unavailable)  # fmt: skip
UNAVAILABLE: Final = Problem(
    _OURS + "unavailable", 503, "The gateway cannot reach its message fabric",
    "Try again after Retry-After.", errors.Unavailable)  # fmt: skip
AUDIT_UNAVAILABLE: Final = Problem(
    _OURS + "audit-unavailable", 503, "The gateway cannot record requests now, so it serves none",
    "Try again after Retry-After; the operator must free space for the audit log.", errors.Unavailable)  # fmt: skip
INTERNAL: Final = Problem(
    _OURS + "internal", 500, "The gateway failed", "Try again; the operator's log says more.", errors.Unavailable)  # fmt: skip
NOT_READY: Final = Problem(
    _OURS + "not-ready", 503, "The gateway has no valid manifest",
    "Try again after Retry-After; the operator can run `lacre manifest publish`.", errors.Unavailable)  # fmt: skip
OVERLOADED: Final = Problem(
    _OURS + "overloaded", 503, "The gateway already serves as many requests as it may",
    "Try again after Retry-After.", errors.Unavailable)  # fmt: skip
SLOW_BODY: Final = Problem(
    _OURS + "slow-body", 408, "The sealed request arrived too slowly", "Try again on a better connection.")  # fmt: skip
NOT_FOUND: Final = Problem(
    _OURS + "not-found", 404, "No such resource",
    "Sealed requests go to POST /v1/sealed: the SDK and `lacre proxy` make them. Nothing else is accepted.")  # fmt: skip
METHOD_NOT_ALLOWED: Final = Problem(
    _OURS + "method-not-allowed", 405, "This resource does not take this method", "See the Allow header.")  # fmt: skip

# The SDK says this in place of `path-not-allowed`: it knows the path, and no gateway does.
UNKNOWN_PATH: Final = Problem(
    _OURS + "unknown-path", 404, "The model API has no such path, and policy does not allow this caller other paths",
    "Use one of the listed paths. For other paths, ask the operator for the action `http`.",
    errors.Forbidden)  # fmt: skip
PATH_FORM: Final = Problem(
    _OURS + "path-form", 404, "The path is not written exactly as in the model API",
    "Use the listed path, exactly as written: without a slash at its end, doubled slashes or escapes.",
    errors.Forbidden)  # fmt: skip
WRONG_METHOD: Final = Problem(
    _OURS + "wrong-method", 405, "The path does not take this method", "Use one of the listed methods.",
    errors.Forbidden)  # fmt: skip

# A balancer or proxy before the gateway says this in its own words: it reached no gateway, or lost the one that it had reached.
NO_GATEWAY: Final = Problem(
    _OURS + "no-gateway", 502, "The proxy before the gateway got no answer from it",
    "Seal a fresh request; this one may have run. The operator should check that gateways are up.",
    errors.Unavailable)  # fmt: skip

# Only said inside the seal, by a worker whose clock and the request's `date` disagree (RFC 9458 section 6.5.2).
DATE: Final = Problem(
    "https://iana.org/assignments/http-problem-types#date", 400, "The request's date is too far from the worker's clock",
    "Set this machine's clock.")  # fmt: skip

BY_TYPE: Final = {
    problem.type: problem
    for problem in (
        INVALID_TOKEN, UNUSABLE_CLAIMS, CLAIMS_ELSEWHERE, INVALID_PROOF, ISSUER_UNAVAILABLE,
        FORBIDDEN, TOO_MANY_TOKENS, PATH_NOT_ALLOWED, INVALID_HEADERS, UNKNOWN_POOL,
        UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, TOO_LARGE,
        UNKNOWN_KEY, INVALID_GRANT, REPLAYED, RATE_LIMITED, NO_WORKER, BUSY, WORKER_LOST, UNCLAIMED, UNAVAILABLE, INTERNAL,
        BUDGET_SPENT, ABOVE_LIMIT, UNKNOWN_PLAN, BUDGET_UNAVAILABLE,
        AUDIT_UNAVAILABLE, NOT_READY, OVERLOADED, SLOW_BODY, NOT_FOUND, METHOD_NOT_ALLOWED,
        UNKNOWN_PATH, PATH_FORM, WRONG_METHOD, NO_GATEWAY,
    )
}  # fmt: skip
