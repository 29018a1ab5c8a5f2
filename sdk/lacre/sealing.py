"""One sealed exchange, without any HTTP library: what to send, what came back, what to do next.

Rules:
- Nothing of the request leaves before a trusted manifest names the key that it is sealed to. There is no plaintext fallback.
- Every attempt is a fresh seal. A gateway's advice before the seal is not authenticated: it can cause one manifest refresh
  and one retry, and it is counted in `attempts`.
- Nothing is tried again that was handed on in part, and nothing that harms where it runs twice: see `lacre.backoff`.
- An answer is whole only when the response's final chunk has opened and the BHTTP message in it has ended. What came in the
  final chunk is passed on after that alone, and after the receipt in it was verified.
- The gateway proves with its answer that it recorded the request, or nothing of the answer is opened.
- The clock correction that a worker's `#date` problem suggests came sealed, and is used for the inner `date` alone.

`Sealing.exchange` and `Sealing.manifest` are generators of the steps in `lacre.steps`: they do no I/O.
"""

from __future__ import annotations

import contextlib
import email.utils
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from lacre import audit, details, receipts
from lacre.audit import AuditProof
from lacre.backoff import ENDURANCE, Retries, delay
from lacre.details import Details
from lacre.errors import (
    Expired,
    InvalidAudit,
    InvalidMessage,
    LacreError,
    NetworkError,
    RefusedError,
    SettingsError,
    TruncatedStream,
    UnsealedResponse,
    UnsupportedSuite,
    UsageError,
)
from lacre.facts import Facts
from lacre.inner import Plain, Prepared, is_repeatable, prepare
from lacre.jws import b64u
from lacre.manifest import MAX_DOCUMENT, Manifest, PoolKey
from lacre.memory import Memory, accept
from lacre.padding import Shape, request_length, shape_named
from lacre.problems import BY_TYPE, DATE, INTERNAL, INVALID_TOKEN, NO_GATEWAY, UNKNOWN_KEY, Problem
from lacre.problems import MEDIA_TYPE as PROBLEM_MEDIA_TYPE
from lacre.receipts import Receipt
from lacre.steps import Offload, Outer, Read, Renew, Send, Steps, Wait, sent_bytes, sent_outer
from lacre.trust import Trusted
from lacre.verification import SealedTo, Signed, Verification, documented
from lacre.wire import bhttp
from lacre.wire.header import MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, Kem
from lacre.wire.ohttp import ResponseOpener, seal_request

ORIGIN: Final = "https://lacre.invalid"  # RFC 2606: never resolves, so what escaped its seal would reach nobody
AUTHORITY: Final = "lacre.invalid"
DEFAULT_KEMS: Final = (Kem.XWING,)
MANIFEST_PATH: Final = "/v1/manifest"
SEALED_PATH: Final = "/v1/sealed"
_OF_PROXIES: Final = frozenset({502, 503, 504})  # what they say, in words of their own, where a gateway does not answer
SALT_LIFETIME: Final = 3600.0  # seconds: the salt scopes the prefix cache, and is a pseudonym for as long as it lives
MAX_CORRECTION: Final = 30 * 86400.0  # seconds; with a clock further off than this, the manifest would not have verified
MAX_PROBLEM: Final = 64 * 1024  # bytes read of a problem document, outside or sealed; ours have some hundred
REFRESH_BEFORE: Final = 0.5  # of a manifest's lifetime: fetched anew then, so that its expiry is never met in a request


@dataclass(frozen=True, slots=True)
class Head:
    """The sealed answer's own status and headers."""

    status: int
    headers: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str:
        """The first value of a header, `name` in lower case; empty where there is none."""
        return next((value for key, value in self.headers if key == name), "")

    @property
    def media_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.get("content-type").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The gateway would not take the request. Nobody signed this. details: what it says beside the problem's type."""

    problem: Problem
    retry_after: float | None
    facts: Facts
    details: Details = field(default_factory=dict)

    def exception(self) -> RefusedError:
        return self.problem.exception(self.retry_after, self.details)


Trailers = tuple[tuple[str, str], ...]


class Opening:
    """Opens one sealed answer as its bytes arrive: first the head, then the pieces of the body, then the trailers.

    The pieces that came before somebody asked for them wait in it. verify: makes the receipt of the trailers, or raises; it
    returns None where none is due.
    """

    def __init__(self, opener: ResponseOpener, facts: Facts, verify: Callable[[Trailers], Receipt | None]) -> None:
        self._opener = opener
        self._verify = verify
        self._decoder = bhttp.ResponseDecoder()
        self._pending: list[bytes] = []
        self._head: Head | None = None
        self.ended = False
        self.facts = facts

    def feed(self, data: bytes | None) -> None:
        """Takes the next bytes of the outer body; None at its end.

        Raises TruncatedStream unless the final chunk had opened by then and the answer in it was whole; InvalidReceipt
        where it was whole, and its receipt does not hold.
        """
        with documented(self.facts.verification):
            self._feed(data)

    def _feed(self, data: bytes | None) -> None:
        for record in self._opener.close() if data is None else self._opener.feed(data):
            self._take(self._decoder.feed(record))
        if data is None:
            self._take(self._decoder.close())
            self.facts.receipt = self._verify(self.facts.trailers)
            self.ended = True

    def _take(self, events: Sequence[bhttp.Event]) -> None:
        for event in events:
            match event:
                case bhttp.Head(informational=False):
                    self._head = _uncoded(Head(event.status, event.headers))
                case bhttp.Data():
                    self._pending.append(event.content)
                case bhttp.End():
                    self.facts.trailers = event.trailers

    @property
    def ready(self) -> bool:
        """Whether enough is here to act on: the head, and of a sealed problem document the whole body."""
        if self._head is None:
            return self.ended
        is_problem = self._head.get("content-type") == PROBLEM_MEDIA_TYPE
        return not is_problem or self.ended or sum(map(len, self._pending)) > MAX_PROBLEM

    @property
    def head(self) -> Head:
        if self._head is None:
            raise InvalidMessage("the sealed answer has no head")
        return self._head

    @property
    def problem_type(self) -> str | None:
        """The type in the sealed problem document, where the answer is one."""
        return Problem.type_in(b"".join(self._pending)) if self.head.get("content-type") == PROBLEM_MEDIA_TYPE else None

    def take(self) -> list[bytes]:
        """The pieces of the body that have opened so far."""
        pieces, self._pending = self._pending, []
        return pieces


class Sealing:
    """What one client seals with: the pinned root, the newest manifest, its salt and its clock correction. Thread-safe.

    kems, shape: what the caller accepts; a manifest that does not offer it is refused, never fallen back from.
    retries: how often a request is sent again before anything of its answer was handed on; None as `lacre.backoff` has it.
    resume: how often an answer that broke off after that is resumed (`lacre.resume`), while a worker at most may be lost by it.
    clock: seconds since the epoch.
    """

    def __init__(
        self,
        root: bytes,
        memory: Memory,
        *,
        pool: str = "default",
        kems: Sequence[Kem] = DEFAULT_KEMS,
        shape: Shape = "pad",
        keep_identifying_fields: bool = False,
        retries: int | None = 0,
        resume: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._memory = memory
        self._pool = pool
        self._kems = tuple(kems)
        self._shape = shape_named(shape)
        self._keep_identifying_fields = keep_identifying_fields
        self._retries = retries
        self.resume = resume
        self._clock = clock
        self._lock = threading.Lock()
        self._trusted: Trusted | None = None
        self._fetched_at = 0.0
        self._doubted = False
        self._clock_offset = 0.0
        self._salt = ""
        self._salt_since = float("-inf")
        self._last: Facts | None = None

    @property
    def verification(self) -> Verification:
        """What was checked of the newest request; before the first, of the manifest, if there is one."""
        with self._lock:
            trusted, last = self._trusted, self._last
        checked = Verification(b64u(self._root), None if trusted is None else Signed.of(trusted, self._clock()))
        return checked if last is None else replace(last.verification, manifest=checked.manifest)

    def manifest(self, endurance: float = ENDURANCE) -> Steps[Manifest]:
        """The verified manifest, fetched where there is none or it grows old."""
        if self._is_stale():
            yield from self._fetch_manifest(endurance)
        return self._current()

    def exchange(self, plain: Plain, endurance: float = ENDURANCE, lost: int = 0) -> Steps[Opening | Refusal]:
        """Seals `plain` as often as it takes: once, and once more for a new key or a corrected clock.

        endurance: seconds for tries of what did not run, where the caller named no number. lost: workers that this call may
        have cost already (see `lacre.backoff`).
        What is returned as `Opening` has its head; the caller reads and feeds the rest.
        """
        try:
            return (yield from self._exchange(plain, endurance, lost))
        except LacreError as exc:
            exc.verification = exc.verification or self.verification
            raise

    def _exchange(self, plain: Plain, endurance: float, lost: int) -> Steps[Opening | Refusal]:
        attempts = 0
        once: set[Problem] = set()  # what was mended already, and is not tried again
        retries = Retries.of(self._retries, repeatable=is_repeatable(plain), endurance=endurance, clock=self._clock, lost=lost)
        while True:
            yield from self.manifest(retries.rest)
            send, opening, sent = self._seal(plain, attempts := attempts + 1)
            try:
                refusal = yield from self._attempt(send, opening, sent)
            except (NetworkError, TruncatedStream) as exc:
                if (seconds := retries.after_failure(exc)) is None:
                    raise
                yield Wait(seconds)
                continue
            opening.facts.lost = retries.lost
            if refusal is None:
                if DATE in once or not self._correct_clock(opening):
                    return opening
                once.add(DATE)
            elif refusal.problem in once or not (yield from self._mended(refusal.problem, retries.rest)):
                if (seconds := retries.after_refusal(refusal.problem, refusal.retry_after)) is None:
                    opening.facts.lost = retries.lost
                    return refusal
                yield Wait(seconds)
            else:
                once.add(refusal.problem)

    def _attempt(self, send: Send, opening: Opening, sent: Mapping[str, object]) -> Steps[Refusal | None]:
        """None once the answer's head is there."""
        outer = sent_outer((yield send))
        if outer.status != 200:
            document = yield from read_all(MAX_PROBLEM)
            with contextlib.suppress(InvalidAudit):  # nobody signed the refusal either: a proof is kept where it holds
                opening.facts.audit = self._proved(outer, sent)
            return Refusal(problem_of(outer, document), outer.retry_after, opening.facts, details.read(document))
        check_sealed(outer)
        opening.facts.audit = self._proved(outer, {**sent, "decision": "allow"})
        while not opening.ready:
            opening.feed(sent_bytes((yield Read())))
        return None

    def _mended(self, problem: Problem, endurance: float) -> Steps[bool]:
        """Whether what the gateway minds may be over now."""
        if problem is UNKNOWN_KEY:
            yield from self._fetch_manifest(endurance)
        return problem is UNKNOWN_KEY or (problem is INVALID_TOKEN and (yield Renew()) is True)

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    def delay(self, number: int) -> float:
        """Seconds before an answer is gone on with for another time."""
        return delay(number)

    def _fetch_manifest(self, endurance: float) -> Steps[None]:
        retries = Retries.of(self._retries, repeatable=True, endurance=endurance, clock=self._clock)
        while True:
            try:
                outer = sent_outer((yield Send("GET", MANIFEST_PATH)))
                # One more than is taken: too long is seen, not cut.
                document = yield from read_all(MAX_DOCUMENT + 1 if outer.status == 200 else MAX_PROBLEM)
            except NetworkError as exc:
                if (seconds := retries.after_failure(exc)) is None:
                    raise
            else:
                if outer.status == 200:
                    yield Offload(partial(self._accept, document))  # signatures, and a file that other processes lock
                    return
                problem = problem_of(outer, document)
                if (seconds := retries.after_refusal(problem, outer.retry_after)) is None:
                    raise problem.exception(outer.retry_after, details.read(document))
            yield Wait(seconds)

    def _accept(self, document: bytes) -> None:
        now = self._clock()
        trusted = accept(document, self._root, self._memory, now)
        with self._lock:
            if self._trusted is None or trusted.manifest.version >= self._trusted.manifest.version:  # threads may overtake
                self._trusted, self._fetched_at, self._doubted = trusted, now, False

    def _proved(self, outer: Outer, sent: Mapping[str, object]) -> AuditProof:
        """The gateway's proof that it recorded what was sent, and for whom. Raises InvalidAudit."""
        try:
            return audit.of_answer(outer.audit, self._current().gateway_key, {**sent, **outer.speaks_for})
        except InvalidAudit:
            self._doubted = True  # the key may have changed: the next request asks for the manifest first
            raise

    def _is_stale(self) -> bool:
        with self._lock:
            if self._trusted is None or self._doubted:
                return True
            lifetime = self._trusted.manifest.expires_at - self._fetched_at
            return self._clock() >= self._fetched_at + lifetime * REFRESH_BEFORE

    def _current(self) -> Manifest:
        with self._lock:
            if self._trusted is None:
                raise UsageError("no manifest was learned yet")
            if self._clock() >= self._trusted.manifest.expires_at:
                raise Expired("the manifest has expired: the operator must run `lacre manifest publish`")
            return self._trusted.manifest

    def _seal(self, plain: Plain, attempt: int) -> tuple[Send, Opening, Mapping[str, object]]:
        """What to send, what opens the answer, and what the gateway's audit entry must say of it."""
        manifest = self._current()
        pool = manifest.pools.get(self._pool)
        if pool is None:
            raise UsageError(f"the manifest has no pool {self._pool!r}: it has {', '.join(sorted(manifest.pools)) or 'none'}")
        key = self._choose([key for key in pool.keys if key.not_after > self._clock()])
        if self._shape not in pool.shapes:
            taken = ", ".join(pool.shapes)
            raise SettingsError(f"pool {self._pool!r} does not take the shape {self._shape!r}: choose one of {taken}")
        prepared = prepare(plain, pool.models, keep_identifying_fields=self._keep_identifying_fields)
        outer = (
            ("lacre-pool", self._pool),
            ("lacre-model", prepared.model),
            ("lacre-action", prepared.action),
            ("lacre-max-tokens", str(prepared.max_tokens)),
            ("lacre-shape", self._shape),
        )
        padded_to = request_length if self._shape == "pad" else None
        body, header, opener = seal_request(key.config, bhttp.encode_request(self._inner(prepared, outer), padded_to=padded_to))
        headers = (*outer, ("content-type", MEDIA_TYPE_REQUEST), ("incremental", "?1"), ("accept", MEDIA_TYPE_RESPONSE))
        facts = Facts(header.suite.kem.label, self._shape, len(body), attempt, self._checked(key))
        self._last = facts

        def verify(trailers: Trailers) -> Receipt:
            return receipts.of_answer(trailers, pool.receipt_key, header.digest, prepared.max_tokens)

        sent = {
            "kind": "intent",
            "enc": b64u(header.digest),
            "pool": self._pool,
            "model": prepared.model,
            "action": prepared.action,
            "max_tokens": prepared.max_tokens,
            "shape": self._shape,
            "kem": facts.kem,
            "sealed_bytes": len(body),
        }
        return Send("POST", SEALED_PATH, headers, body, sealed=header.digest), Opening(opener, facts, verify), sent

    def _checked(self, key: PoolKey) -> Verification:
        with self._lock:
            signed = None if self._trusted is None else Signed.of(self._trusted, self._clock())
        return Verification(b64u(self._root), signed, SealedTo.of(self._pool, key))

    def _inner(self, prepared: Prepared, outer: Sequence[tuple[str, str]]) -> bhttp.Request:
        plain = prepared.plain
        date = email.utils.formatdate(self._clock() + self._clock_offset, usegmt=True)
        own = (("date", date), ("lacre-cache-salt", self.salt()))
        return bhttp.Request(plain.method, "https", AUTHORITY, plain.path, (*plain.headers, *own, *outer), plain.content)

    def _choose(self, keys: Sequence[PoolKey]) -> PoolKey:
        for kem in self._kems:
            for key in keys:
                if key.config.kem is kem:
                    return key
        wanted = ", ".join(kem.label for kem in self._kems)
        raise UnsupportedSuite(f"pool {self._pool!r} has no current key for {wanted}: ask its operator, or accept another KEM")

    def salt(self) -> str:
        """The prefix cache's scope: random, this client's own, and another one each hour."""
        with self._lock:
            if self._clock() - self._salt_since >= SALT_LIFETIME:
                self._salt, self._salt_since = secrets.token_hex(16), self._clock()
                self._clock_offset = 0.0  # learned from one worker; RFC 9458 section 6.5.2 wants it short-lived
            return self._salt

    def _correct_clock(self, opening: Opening) -> bool:
        """Whether the answer is the worker's `#date` problem with a date to go by (RFC 9458 section 6.5.2)."""
        if opening.problem_type != DATE.type:
            return False
        try:
            theirs = email.utils.parsedate_to_datetime(opening.head.get("date")).timestamp()
        except (ValueError, OverflowError):  # the second for numbers that no date can hold
            return False
        offset = theirs - self._clock()
        if abs(offset) > MAX_CORRECTION:
            return False
        self._clock_offset = offset
        return True


def read_all(limit: int) -> Steps[bytes]:
    """Up to `limit` bytes of the last response."""
    content = bytearray()  # which grows in place: a peer may send a byte at a time
    while len(content) < limit and (data := sent_bytes((yield Read()))) is not None:
        content += data
    return bytes(content[:limit])


def _uncoded(head: Head) -> Head:
    """No worker was asked to compress, and what one byte may unfold to has no bound. Raises InvalidMessage."""
    codings = (value.strip().lower() for name, value in head.headers if name == "content-encoding")
    if any(coding not in ("", "identity") for coding in codings):  # in whichever field: an HTTP library applies them all
        raise InvalidMessage("the worker's answer is compressed, which nobody asked for: what it serves must not do that")
    return head


def problem_of(outer: Outer, body: bytes) -> Problem:
    """The row of our own table that the gateway named, or else one of the same status. Its words are never shown: they are
    nobody's.
    """  # fmt: skip
    named = BY_TYPE.get(Problem.type_in(body) or "")
    if named is not None:
        return named
    if outer.status in _OF_PROXIES:
        return NO_GATEWAY
    return next((problem for problem in BY_TYPE.values() if problem.status == outer.status), INTERNAL)


def check_sealed(outer: Outer) -> None:
    if outer.content_type.partition(";")[0].strip().lower() != MEDIA_TYPE_RESPONSE:
        raise UnsealedResponse("the gateway answered without a seal; nothing of it was read: check the gateway's address")
