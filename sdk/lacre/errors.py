"""Every error that Lacre raises: one tree, and each branch names whose fault it is.

========================  ==========================================  ===========================================
branch                    whose fault                                 what helps
========================  ==========================================  ===========================================
`UsageError`              the caller's code or settings               change the call or the setting
`ProtocolError`           the peer's bytes have the wrong form        report it; nothing of them was used
`VerificationError`       the peer's bytes prove nothing              do not trust the peer; pin or key may be old
`RefusedError`            nobody's: the gateway or policy said no     a token, a smaller request, or waiting
`NetworkError`            the network's                               try again
`ApiError`                the request, says the model's own server    read `code`; the answer itself was sealed
========================  ==========================================  ===========================================

Messages say what to do next, and never hold key material, tokens, prompts or answers.
"""

from __future__ import annotations


class LacreError(Exception):
    """Base of every error that Lacre raises."""


# The caller's misuse


class UsageError(LacreError):
    """The calling code or its settings are wrong; the message names the remedy."""


class SettingsError(UsageError):
    """A connection string, settings file, key file or environment variable does not say what it must."""


class AlreadyUsedError(UsageError):
    """A one-use object (a request sealer, a response opener) was used a second time."""


class DestinationError(UsageError):
    """A request for an address that is not `lacre.BASE_URL` was given to a sealed client."""


# The peer's bytes


class ProtocolError(LacreError):
    """The peer sent bytes that are not of the form the protocol asks for."""


class InvalidMessage(ProtocolError):
    """A message that breaks its format (RFC 9292, RFC 9458, a JWS, a frame)."""


class MessageTooLarge(ProtocolError):
    """A message, chunk, header or field longer than its limit; refused before it was buffered."""


class TruncatedStream(ProtocolError):
    """The stream ended before its final chunk: whatever came before it is not the whole answer."""


class UnsupportedSuite(ProtocolError):
    """A KEM, KDF or AEAD that this side does not have or does not accept."""


class UnsealedResponse(ProtocolError):
    """The gateway answered success with something that is not a sealed response; it was not read."""


class UnknownKeyId(ProtocolError):
    """A sealed request names a key that this side does not hold."""


# A failed verification


class VerificationError(LacreError):
    """The bytes have the right form, but the proof they must carry does not hold."""


class OpenError(VerificationError):
    """A sealed chunk did not open: altered, out of order, or sealed to another key."""


class InvalidSignature(VerificationError):
    """A signature by a key that is not the expected one, or over other bytes."""


class Expired(VerificationError):
    """A signed statement (manifest, signer, grant) is past its expiry, or not yet valid."""


class Rollback(VerificationError):
    """A manifest older than one already seen, or another one under the same version."""


class UntrustedRoot(VerificationError):
    """No chain of statements leads from the pinned root to the signer of the manifest."""


class InvalidReceipt(VerificationError):
    """The answer's receipt is missing, is not by the pool, is for another request, or does not agree with the answer."""


class InvalidProof(VerificationError):
    """A Merkle proof that does not lead from what it is about to the root that it must reach."""


class InvalidAudit(VerificationError):
    """The answer's `Lacre-Audit` is missing, is not by the gateway's key, or does not prove that this request was recorded."""


# A refusal


class RefusedError(LacreError):
    """The gateway would not take the request. What a gateway says before the seal is *not* authenticated.

    status: the outer HTTP status, 4xx or 5xx.
    problem: the problem type (RFC 9457), one of `lacre.problems`.
    retry_after: seconds to wait before trying again, where the gateway said so.
    """

    def __init__(self, message: str, *, status: int, problem: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem
        self.retry_after = retry_after


class Unauthenticated(RefusedError):
    """The token is missing, wrong, expired or meant for another audience (401)."""


class Forbidden(RefusedError):
    """Policy does not allow this caller this action (403)."""


class RateLimited(RefusedError):
    """A limit or budget is used up (429)."""


class Unavailable(RefusedError):
    """No worker, or none free in time (503)."""


# The network


class NetworkError(LacreError):
    """The gateway could not be reached, or the connection broke."""


# The model's own server, from inside the seal


class ApiError(LacreError):
    """An OpenAI-style error that came sealed from the worker.

    status: the inner HTTP status. code: OpenAI's `error.code`, such as `context_length_exceeded`, or None.
    type: OpenAI's `error.type`, such as `invalid_request_error`.
    """

    def __init__(self, message: str, *, status: int, code: str | None, type: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.type = type
