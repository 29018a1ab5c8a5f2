"""Every error that Lacre raises: one tree, and each branch names whose fault it is.

| branch              | whose fault                              | what helps                                   |
|---------------------|------------------------------------------|----------------------------------------------|
| `UsageError`        | the caller's code or settings            | change the call or the setting               |
| `ProtocolError`     | the peer's bytes have the wrong form     | report it; none of them were used            |
| `VerificationError` | the peer's bytes prove nothing           | do not trust the peer; pin or key may be old |
| `RefusedError`      | no fault: the gateway or policy said no  | a token, a smaller request, or waiting       |
| `NetworkError`      | the network's                            | try again                                    |
| `ApiError`          | the request, says the model's own server | read `code`; the answer itself was sealed    |

Each type has a `remedy`: one sentence that says what to do next. A refusal has its problem's. `docs/errors.md` lists them all.
Messages and remedies never hold key material, tokens, prompts or answers. A client's error also has a `verification`:
which checks were done by then, and which were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import httpx2

Detail = str | int | float | tuple[str, ...]
Details = Mapping[str, Detail]  # members of a problem document, as `lacre.problems.details` has them


class Checked(Protocol):
    """The checks of an exchange. A client's errors carry a `lacre.Verification`; `lacre.Verification.of` returns it."""

    def members(self) -> dict[str, Any]:
        """As JSON objects."""
        ...


class LacreError(Exception):
    """Base of every error that Lacre raises.

    remedy: what to do next. verification: the checks of the exchange that failed, or None. request_id: the gateway's name for
    the request, by which its operator finds it in logs and audit; nobody signed it. None if no gateway answered.
    """

    remedy: str = "Read the message; it names what to do next."
    verification: Checked | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        """What is wrong, and the gateway's name for the request."""
        said = super().__str__()
        return said if self.request_id is None else f"{said} (request id: {self.request_id})"

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: a process pool pickles its workers' errors to return them.

        The copy holds everything except the request that httpx2 keeps in its errors, because the prompt is in it.
        """
        state = dict(self.__dict__)
        if "_request" in state:
            state["_request"] = None
        return _copied, (type(self), self.args, state)


def _copied(kind: type[LacreError], args: tuple[Any, ...], state: dict[str, Any]) -> LacreError:
    error = kind.__new__(kind, *args)  # not by its constructor: each kind takes other arguments
    error.__dict__.update(state)
    return error


# The caller's misuse


class UsageError(LacreError):
    """The calling code or its settings are wrong; the message names the remedy."""

    remedy = "Change the call as the message says."


class SettingsError(UsageError):
    """A connection string, settings file, key file or environment variable has a wrong value."""

    remedy = "Correct the setting that the message names."


class OutputError(UsageError):
    """The output of the `lacre` command cannot be written: its disk is full, or its stdout is closed."""

    remedy = "Free some space or write the output elsewhere, then run the command again: the lost output is not kept."


class AlreadyUsedError(UsageError):
    """A one-use object (a request sealer, a response opener) was used twice."""

    remedy = "Seal the request again: each of these objects works only once."


class DestinationError(UsageError):
    """A sealed client was given a request for an address other than `lacre.BASE_URL`."""

    remedy = "Use `lacre.BASE_URL` with this client, and another client for other addresses."


# The peer's bytes


class ProtocolError(LacreError):
    """The peer sent bytes of a form that the protocol does not allow."""

    remedy = "Try once more. If it fails again, tell the operator; none of the received bytes were used."


class InvalidMessage(ProtocolError):
    """A message that breaks its format (RFC 9292, RFC 9458, a JWS, a frame)."""

    remedy = "Check that the versions of client, gateway and worker are compatible, then report it to the operator."


class NewerFormat(InvalidMessage):
    """A message in a newer version of its format than this program reads. The message names the program to upgrade."""

    remedy = (
        "Upgrade the program that the message names, or use one of the version before on the other side (docs/upgrades.md)."
    )


class MessageTooLarge(ProtocolError):
    """A message, chunk, header or field longer than its limit; refused before it was buffered."""

    remedy = "Send a smaller request; if the answer was too large, report it to the operator."


class TruncatedStream(ProtocolError):
    """The stream ended before its final chunk: the received part is not the whole answer.

    cut: whether the connection broke. If a worker may be lost, a running gateway ends the answer properly. So a broken
    connection means the gateway ended or the network failed.
    """

    remedy = "Ask again: the received part is not the whole answer."
    cut = False


class StreamBroken(TruncatedStream):
    """A streamed answer broke off and could not be resumed. The error carries the received part.

    text: of the first choice. tokens: how many tokens of the answer arrived, as far as the worker told.
    """

    remedy = "Ask again, or continue from `text` yourself; `__cause__` says why the client did not resume the answer."

    def __init__(self, message: str, *, text: str = "", tokens: int = 0) -> None:
        super().__init__(message)
        self.text = text
        self.tokens = tokens


class GaveUp(TruncatedStream):
    """The worker ended its stream with an error: it failed, or it shuts down."""

    remedy = "Ask again: another worker may succeed."


class UnsupportedSuite(ProtocolError):
    """A KEM, KDF or AEAD that this side does not have or does not accept."""

    remedy = "Accept another KEM with `kem=...`, or ask the pool's operator for a key of the one you want."


class UnsealedResponse(ProtocolError):
    """The gateway answered success with something that is not a sealed response; it was not read."""

    remedy = "Check the gateway's address: something else answers there."


class UnknownKeyId(ProtocolError):
    """A sealed request names a key that this side does not hold."""

    remedy = "Fetch the manifest and seal the request again; `lacre.Client` does both by itself."


# A failed verification


class VerificationError(LacreError):
    """The bytes have the right form, but the proof they must carry does not hold."""

    remedy = "Do not trust the peer, and send nothing until the operator has explained it."


class OpenError(VerificationError):
    """A sealed chunk did not open: altered, out of order, or sealed to another key."""

    remedy = "Ask again. If it fails again, something between here and the worker alters answers: tell the operator."


class InvalidSignature(VerificationError):
    """A signature by a key that is not the expected one, or over other bytes."""

    remedy = "Check the connection string against the operator's; if it is right, tell the operator."


class Expired(VerificationError):
    """A signed statement (manifest, signer, grant) is past its expiry, or not yet valid."""

    remedy = "Set this machine's clock; if it is right, the operator must run `lacre manifest publish`."


class Rollback(VerificationError):
    """A manifest older than one already seen, or a different one of the same version."""

    remedy = "Tell the operator: the gateway serves an older manifest than it did before."


class UntrustedRoot(VerificationError):
    """No chain of statements leads from the pinned root to the signer of the manifest."""

    remedy = "Get the connection string again, over a channel that the gateway's operator cannot alter."


class InvalidReceipt(VerificationError):
    """The answer's receipt is missing, is not the pool's, is for another request, or does not agree with the answer."""

    remedy = "Keep the answer and the error, and tell the pool's operator: the receipt does not hold."


class WrongModel(VerificationError):
    """A receipt names a model file that the manifest does not, or either names one that `pin_models` does not."""

    remedy = "Do not use the answer. Ask the pool's operator which file it serves; correct `pin_models` if that changed."


class InvalidProof(VerificationError):
    """A Merkle proof that does not lead from its entry to the root."""

    remedy = "Tell the operator of the log, and keep the proof."


class InvalidAudit(VerificationError):
    """The answer's `Lacre-Audit` is missing, is not signed by the gateway's key, or does not prove that the request was
    recorded.
    """

    remedy = "Update the gateway, or tell its operator: it does not prove that it recorded the request."


# A refusal


class RefusedError(LacreError):
    """The gateway refused the request. Nothing authenticates what a gateway says before the seal.

    status: the outer HTTP status, 4xx or 5xx. problem: the problem type (RFC 9457), one of `lacre.problems`. retry_after:
    seconds to wait before the next try, if the gateway said so. details: which limit, how much, which names are valid: the
    members of `lacre.problems.details` in the gateway's answer.
    """

    remedy = "Do as the problem's title says; the operator finds more in the log, by time and caller."

    def __init__(
        self, message: str, *, status: int, problem: str, retry_after: float | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message)
        self.remedy = remedy or type(self).remedy
        self.status = status
        self.problem = problem
        self.retry_after = retry_after
        self.details: Details = {}


class Unauthenticated(RefusedError):
    """The token is missing, wrong, expired or meant for another audience (401)."""

    remedy = "Get a fresh token for this gateway, and pass it as `token=...` or in LACRE_TOKEN."


class Forbidden(RefusedError):
    """Policy does not allow this caller this action (403)."""

    remedy = "Ask the operator for access, or for a pool, model or token limit that policy allows."


class RateLimited(RefusedError):
    """A limit or budget is used up (429)."""

    remedy = "Wait for `retry_after` seconds, ask for fewer tokens, or ask the operator for a larger plan."


class Unavailable(RefusedError):
    """No worker, or none that is free in time (503)."""

    remedy = "Wait for `retry_after` seconds and try again; the operator can start more workers."


# The network

Cause = Literal[
    "refused", "name", "route", "certificate", "tls", "not-tls", "not-http", "proxy", "timeout", "busy", "broken", "other"
]


class NetworkError(LacreError):
    """The client could not reach the gateway, or the connection broke before the answer.

    reached: whether there was a connection, so that the request may have run. timed_out: whether a time limit passed.

    cause, one of:
    - `refused`: nothing listens there. `name`: the name is unknown. `route`: there is no route. `proxy`: the proxy failed.
    - `certificate`: the certificate is not trusted. `tls`, `not-tls`, `not-http`: the two sides use different protocols.
    - `timeout`: a time limit passed. `busy`: all of the client's own connections were in use.
    - `broken`: the connection broke. `other`: anything else.
    """

    remedy = "Check the address and the network, and try again."
    reached = True
    timed_out = False
    cause: Cause = "other"


class Unreachable(NetworkError, httpx2.NetworkError):
    """The client could not reach the gateway, or the connection broke before the answer. Both Lacre's and httpx2's."""

    remedy = "Check the address in LACRE_URL, and that the gateway runs; then try again."


class TimedOut(NetworkError, httpx2.TimeoutException):
    """The gateway did not connect or answer in time. Both Lacre's and httpx2's."""

    remedy = "Try again, or set a longer `timeout=...`: a queue and a long prompt take time."
    timed_out = True
    cause: Cause = "timeout"


# The model's own server, from inside the seal


class ApiError(LacreError):
    """An OpenAI-style error that came sealed from the worker.

    status: the inner HTTP status. code: OpenAI's `error.code`, such as `context_length_exceeded`, or None.
    type: OpenAI's `error.type`, such as `invalid_request_error`.
    """

    remedy = "Change the request as the message and `code` say; the answer itself was sealed."

    def __init__(self, message: str, *, status: int, code: str | None, type: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.type = type


# An app behind the seal


class AppFailed(LacreError):
    """The ASGI app raised, or returned before its response was complete. `__cause__` is only for the worker's own log."""

    remedy = "Look at `__cause__`: the app's own error."


class AppLost(LacreError):
    """An ASGI app raises it if the process that computes its answers has ended. begun: whether this call may have ended it."""

    remedy = "Send the request again: another worker may answer it."

    def __init__(self, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun
