"""Makes one answer for the caller out of one or more sealed requests. It does no I/O: see `lacre.exchange.call`.

Rules:
- An answer stays with its pool and its model, even if its route changes meanwhile.
- Text that the caller has is never taken back and never repeated: see `lacre.exchange.sse_join`.
- A new request resumes at exactly the tokens received, on the same model file, or not at all.
- An answer of which the caller has nothing starts again, if asking again does no harm.
- The caller learns what the answer took over all its requests: `attempts`, `parts`, and `usage` as the sum.
- A request that may have ended one worker goes to one more, and to no third: see `lacre.exchange.retry`. A broken connection
  does not count as a lost worker.
- All resumptions of one answer share one time limit.
- A stalled answer is the caller's own timeout, and an altered one is an attack: neither is resumed.
"""

from __future__ import annotations

import json
from dataclasses import replace

from lacre.errors import GaveUp, InvalidReceipt, LacreError, StreamBroken, TruncatedStream, UsageError
from lacre.exchange.call import Sealing
from lacre.exchange.request import Plain, is_repeatable
from lacre.exchange.resume_marks import ANSWER, ASK, DIGEST, MEMBER, YES
from lacre.exchange.retry import ENDURANCE_RESUMING, MOST_LOST, may_have_lost
from lacre.exchange.sealed_answer import GatewayRefusal, Opening
from lacre.exchange.sse_join import Splice
from lacre.exchange.steps import Steps, Wait
from lacre.exchange.stream_state import LIFETIME, StreamState
from lacre.wire.records import EVENT_STREAM


def asking(plain: Plain) -> Plain:
    """The request, with the wish for resume marks if its answer may be a stream that can be resumed."""
    own_affair = f'"{MEMBER}"'.encode() in plain.content  # the application resumes answers itself
    if not is_repeatable(plain) or b'"stream"' not in plain.content or own_affair:
        return plain
    return replace(plain, headers=(*(field for field in plain.headers if field[0] != ASK), (ASK, YES)))


class ResumableAnswer:
    """plain: the application's request. opening: its first sealed answer, which has its head."""

    def __init__(self, sealing: Sealing, plain: Plain, opening: Opening, begun: StreamState | None = None) -> None:
        """begun: the part that another process received. Raises StreamBroken if the worker has another model file."""
        self._sealing = sealing
        self._plain = replace(plain, stays=(opening.facts.pool, opening.facts.model)) if opening.facts.pool else plain
        self._opening = opening
        self._made = 0  # further requests so far
        self._rest = ENDURANCE_RESUMING  # seconds left for them
        self._handed = False
        self._ready: list[bytes] = []
        self.head = opening.head
        self.facts = opening.facts
        self._digest = self.head.get(DIGEST) if any(name == ASK for name, _ in plain.headers) else ""
        self._answer = self.head.get(ANSWER)
        streams = sealing.resume > 0 and self.head.status == 200 and self.head.media_type == EVENT_STREAM
        self._splice = Splice(marked=bool(self._digest)) if streams else None
        if begun is not None and self.head.status == 200:
            self._splice = Splice.after(begun)
            if self.head.get(DIGEST) != begun.digest:
                raise self._broken("this answer was begun by another model file")
        if self._splice is not None:
            self.facts.tokens = self._splice.tokens
        self._collect()
        self._finish()

    @property
    def root(self) -> bytes:
        """The client's."""
        return self._sealing.root

    @property
    def ended(self) -> bool:
        """Whether the whole answer was received."""
        return self._opening.ended

    def state(self) -> StreamState:
        """What another process needs to read this answer on. Raises UsageError if none could."""
        splice = self._splice
        if self.ended:
            raise UsageError("the answer has ended: keep its text, there is nothing left to continue")
        if splice is None or not splice.open or not splice.tokens:
            raise UsageError("this answer cannot be continued (yet): it needs one choice, and a first piece of it")
        if splice.said.partly:
            raise UsageError("another process cannot be told of this answer: it has log probabilities")
        body = json.loads(self._plain.content)
        content = json.dumps(body | {"model": self.facts.model}).encode()  # of the pool: not a route, nor another's default
        until = self._sealing.now() + LIFETIME
        return StreamState(content, self._member(splice), splice.said.delta, splice.head, until, self.facts.pool)

    def take(self) -> list[bytes]:
        """The bytes that the caller may have now."""
        ready, self._ready = self._ready, []
        self._handed |= bool(ready)
        return ready

    def feed(self, data: bytes | None) -> None:
        """Takes the next bytes of the outer body; None at its end. After an error, `resume` may help."""
        self._opening.feed(data)
        self._collect()
        if self._opening.ended and self._splice is not None and self._splice.failed and self._continuation() is not None:
            raise GaveUp("the worker gave up before the end of the answer: the received part is not the whole answer")
        self._finish()

    def resume(self, error: LacreError) -> Steps[None]:
        """Resumes the answer by a new request. Raises `error` if its kind is not resumed, and StreamBroken."""
        self.facts.tell(error)
        if not isinstance(error, TruncatedStream) or self._sealing.resume == 0:
            raise error
        self._collect()
        self.facts.lost += may_have_lost(error)
        content = self._continuation()
        if content is None:
            raise self._broken(str(error)) from error
        self._made += 1
        began = self._sealing.now()
        if self._made > 1:
            yield Wait(self._sealing.delay(self._made - 1))
        if self._splice is not None:
            self.facts.broke_off(*self._splice.seam())
        try:
            again = self._sealing.exchange(replace(self._plain, content=content), self._rest, self.facts.lost)
            outcome = yield from again
        except LacreError as exc:
            raise self._broken("the answer broke off, and the request to resume it failed") from exc
        self._rest -= self._sealing.now() - began
        self.facts.attempts += outcome.facts.attempts
        self.facts.lost = outcome.facts.lost
        if isinstance(outcome, GatewayRefusal):
            refusal = outcome.exception()
            raise self._broken("the answer broke off, and the gateway refused to resume it") from refusal
        self._join(outcome)

    def _collect(self) -> None:
        pieces = self._opening.take()
        self._ready += pieces if self._splice is None else filter(None, map(self._splice.feed, pieces))

    def _finish(self) -> None:
        if not self._opening.ended or self._splice is None:
            return
        if self._digest and (self.facts.receipt is None or self.facts.receipt.model != self._digest):
            raise InvalidReceipt("the answer and its receipt name different model files: tell the pool's operator")
        if held := self._splice.end():
            self._ready.append(held)

    def _continuation(self) -> bytes | None:
        """The body of the request that resumes the answer or starts it again; None if neither is possible."""
        if self._made >= self._sealing.resume or self.facts.lost >= MOST_LOST or self._rest <= 0:
            return None
        if self._splice is not None and self._splice.tokens:
            if not self._splice.open:
                return None
            body = json.loads(self._plain.content) | {MEMBER: self._member(self._splice)}
            return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        untouched = not self._handed and not self._ready
        return self._plain.content if untouched and is_repeatable(self._plain) else None

    def _member(self, splice: Splice) -> dict[str, object]:
        """What tells the next worker where the answer is."""
        named = {"answer": self._answer} if self._answer else {}
        return {"digest": self._digest, **named, "tokens": list(splice.tokens)}

    def _join(self, opening: Opening) -> None:
        head = opening.head
        if (head.status, head.media_type) != (self.head.status, self.head.media_type):
            raise self._broken(f"the answer broke off, and a worker refused to resume it (status {head.status})")
        if self._digest and head.get(DIGEST) != self._digest:
            raise self._broken("the answer broke off, and the next worker has a different model file")
        self._answer = head.get(ANSWER)  # a new one, if the answer began again
        self.facts.goes_on(opening.facts)
        self._opening, opening.facts = opening, self.facts
        self._collect()
        self._finish()

    def _broken(self, message: str) -> StreamBroken:
        splice = self._splice
        text, tokens = ("", 0) if splice is None else (splice.said.text, len(splice.tokens))
        broken = StreamBroken(message, text=text, tokens=tokens)
        self.facts.tell(broken)
        return broken
