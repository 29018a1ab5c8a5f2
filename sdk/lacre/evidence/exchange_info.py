"""Facts about an answer beside its content: how often the client asked, what it took, which checks were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal

from lacre.errors import LacreError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.prices import TokenPrice, amount
from lacre.evidence.receipts import Receipt
from lacre.evidence.verification import Verification
from lacre.wire.padding import Shape


@dataclass(frozen=True, slots=True)
class Part:
    """What one request took whose answer broke off, in tokens, as far as the worker told.

    receipt: None, except if the worker gave up properly. audit: the gateway's proof that it recorded the request.
    """

    prompt: int
    cached: int
    completion: int
    receipt: Receipt | None
    audit: AuditProof | None = field(repr=False)


@dataclass(slots=True)
class Facts:
    """Facts about an exchange; on a response as `extensions["lacre"]`.

    attempts: how many sealed requests were sent for it. lost: workers that were, or may have been, lost while they had it.
    parts: the usage of requests whose answers broke off. request_id: the gateway's name for the newest request; nobody signed
    it. action, pool, model: as the request named them to the gateway; empty without a gateway. tokens: ids of the answer's
    tokens, if the worker of a stream sends them. checked: the checks before anything was sent; `verification` adds the later
    ones. audit: the gateway's verified proof that it recorded this request; None on a refusal without a proof. receipt,
    trailers: present once the answer has ended; the receipt is verified. None until then, and on a refusal. price: the model's,
    if the client knows it.
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
    action: str = ""
    pool: str = ""
    model: str = ""
    price: TokenPrice | None = None

    def broke_off(self, prompt: int, cached: int, completion: int) -> None:
        """The present request took this much, and another continues its answer."""
        self.parts.append(Part(prompt, cached, completion, self.receipt, self.audit))
        self.receipt, self.audit, self.trailers = None, None, ()

    def goes_on(self, other: Facts) -> None:
        """`other`'s request is now the present one. Its whole answer may have arrived with the head."""
        self.checked, self.audit, self.receipt, self.trailers = other.checked, other.audit, other.receipt, other.trailers
        self.request_id = other.request_id

    def tell(self, error: LacreError) -> None:
        """Attaches these facts to an error that leaves; an error that already has some keeps them."""
        error.verification = error.verification or self.verification
        if error.request_id is None and self.request_id is not None:
            error.request_id = self.request_id

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """The receipts of all requests so far; a request whose worker was lost has none."""
        return tuple(each for each in (*(part.receipt for part in self.parts), self.receipt) if each is not None)

    @property
    def cost(self) -> Decimal | None:
        """Of all requests for the whole answer, in the currency's unit; None before its end, or without a price."""
        if self.price is None or self.receipt is None:
            return None
        spent = [(part.prompt, part.cached, part.completion) for part in self.parts]
        paid = self.receipt
        spent.append((paid.prompt_tokens, paid.cached_tokens, paid.completion_tokens))
        return amount(sum(self.price.of(*counts) for counts in spent))

    @property
    def verification(self) -> Verification:
        """The checks of this exchange so far."""
        return replace(self.checked, receipt=self.receipt, audit=self.audit)


@contextmanager
def documented(facts: Facts) -> Iterator[None]:
    """Attaches the facts of the exchange to an error that leaves."""
    try:
        yield
    except LacreError as exc:
        facts.tell(exc)
        raise
