"""What is known about an answer beside its content: how often it was asked for, what it took, what was checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from lacre.errors import LacreError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.receipts import Receipt
from lacre.evidence.verification import Verification
from lacre.wire.padding import Shape


@dataclass(frozen=True, slots=True)
class Part:
    """What one request of several took, that broke off: in tokens, as far as the worker told before it did.

    receipt: None, but for a worker that gave up in order. audit: the gateway's proof that it recorded the request.
    """

    prompt: int
    cached: int
    completion: int
    receipt: Receipt | None
    audit: AuditProof | None = field(repr=False)


@dataclass(slots=True)
class Facts:
    """What is known about an exchange; on a response as `extensions["lacre"]`.

    attempts: how often something was sealed and sent for it. lost: workers that were lost while they had it, or may have been.
    parts: what those requests took that broke off.
    request_id: the gateway's name for the newest of its requests; nobody signed it.
    tokens: ids of the answer's tokens, as far as the worker of a stream told them.
    checked: what was checked before anything was sent; `verification` adds what has come since.
    audit: the gateway's proof that it recorded this request, verified; None on a refusal that brings none.
    receipt, trailers: there once the answer has ended; the receipt is verified. None until then, and on a refusal.
    """

    kem: str
    shape: Shape
    sealed_request_bytes: int
    attempts: int
    checked: Verification = field(repr=False)
    receipt: Receipt | None = None
    audit: AuditProof | None = None
    trailers: tuple[tuple[str, str], ...] = ()
    parts: list[Part] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list, repr=False)
    lost: int = 0
    request_id: str | None = None

    def broke_off(self, prompt: int, cached: int, completion: int) -> None:
        """The request of now took so much, and another goes on."""
        self.parts.append(Part(prompt, cached, completion, self.receipt, self.audit))
        self.receipt, self.audit, self.trailers = None, None, ()

    def goes_on(self, other: Facts) -> None:
        """The request of now is `other`'s. All of its answer may have come with its head."""
        self.checked, self.audit, self.receipt, self.trailers = other.checked, other.audit, other.receipt, other.trailers
        self.request_id = other.request_id

    def tell(self, error: LacreError) -> None:
        """Attaches what is known to an error that leaves; one that has it already keeps it."""
        error.verification = error.verification or self.verification
        if error.request_id is None and self.request_id is not None:
            error.request_id = self.request_id
            error.add_note(f"The gateway's id of the request: {self.request_id}")

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Those that came, over all requests; a request whose worker was lost brings none."""
        return tuple(each for each in (*(part.receipt for part in self.parts), self.receipt) if each is not None)

    @property
    def verification(self) -> Verification:
        """What was checked of this exchange so far."""
        return replace(self.checked, receipt=self.receipt, audit=self.audit)


@contextmanager
def documented(facts: Facts) -> Iterator[None]:
    """Attaches what is known of the exchange to an error that leaves."""
    try:
        yield
    except LacreError as exc:
        facts.tell(exc)
        raise
