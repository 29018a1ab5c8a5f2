"""Masks: which tokens a grammar allows next. llguidance computes them outside the decode thread.

Rules:
- A grammar is compiled once per request, outside of any event loop. The request's choices share the result and the cost limit.
- The decode thread computes no mask. While the model computes a token, a mask thread computes the mask for the token after it.
- A late mask delays only its own sequence. Sequences whose masks were cheap are served first.
- Reaching any limit of llguidance is an error: an answer is never cut short or left unconstrained because its grammar is
  costly.
- llguidance never tokenizes here. Masks need only the tokens' bytes. Grammars forbid it to look for forced tokens, because that
  would pass a caller's text to the tokenizer.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from lacre.runtime import tasks
from lacre_backend.engine.distinct import ENDS_NUMBER, ENDS_TEXT, Watch, split
from lacre_backend.engine.model import Model
from lacre_backend.engine.protocol import NO_FORCING, EngineError, GrammarTooCostly, GrammarTooLarge, TaskRefused

Allowed: TypeAlias = NDArray[np.bool_]  # for each token of the vocabulary

MAX_SOURCE: Final = 2 * 2**20  # bytes of a grammar; the schemas of a request take at most half
START_SECONDS: Final = 0.5  # of mask time that a request of any length may use: some grammars are slow at first
TOKEN_SECONDS: Final = 0.004  # further seconds per token; common schemas use a tenth of them
GRACE: Final = 0.002  # seconds that a step waits for masks that are usually fast, rather than leave them to the next step
REHEARSED: Final = 4  # tokens; each takes some tenths of a millisecond
CLOSE_LIMIT: Final = 1.0  # seconds; the slowest mask takes some hundredths of one
_STATES: Final = 32_000  # of a grammar's lexer; each takes about 1.5 kB
# The rest are llguidance's own limits. Admission and the documentation rely on them: 2,000 alternatives at one place, and about
# 15 ms for the slowest mask.
_LIMITS: Final = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=_STATES,
    max_grammar_size=500_000,
    verbose_errors=False,
)
THREADS: Final = max(1, min(4, (os.cpu_count() or 1) // 4))  # a mask takes a hundredth of a step
_END: Final = -1  # sorts before all wanted masks


class _Pieces:
    """The vocabulary for llguidance: the bytes of each token. Control tokens are marked by a byte that no text contains."""

    def __init__(self, model: Model) -> None:
        control = {
            token.id: token.text.encode() for token in model.info.control_tokens if token.id not in model.info.spoken_ids
        }
        self.tokens = [b"\xff" + control[i] if i in control else model.piece(i) for i in range(model.n_vocab)]
        self.special_token_ids = sorted(control)
        self.eos_token_id = next(i for i in range(model.n_vocab) if model.ends(i))
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        raise EngineError(f"Masks must not tokenize; got a text of {len(text)} characters.")


class Compiled:
    """A `Grammar` of one request. begun: the tokens of the answer that it has consumed."""

    def __init__(self, matcher: LLMatcher, allowed: Allowed, begun: tuple[int, ...], watch: Watch | None = None) -> None:
        """watch: the answer's lists whose items must differ."""
        self.matcher = matcher
        self.watch = watch
        self.allowed = allowed
        self.begun = begun
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._tokens = 0

    @property
    def seconds(self) -> float:
        """CPU time of all masks so far, in seconds."""
        return self._seconds

    def charge(self, seconds: float) -> None:
        """Counts one token and the time of its mask. Raises `GrammarTooCostly` if the request exceeds its limit."""
        with self._lock:
            self._seconds += seconds
            self._tokens += 1
            if self._seconds > START_SECONDS + TOKEN_SECONDS * self._tokens:
                raise GrammarTooCostly("The grammar took more time than its request may spend on it. Simplify the schema.")


class Masks:
    """An engine's masks, and the threads that compute them until `close`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._wanted: queue.PriorityQueue[tuple[float, int, Constraint | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._words = (model.n_vocab + 31) // 32
        # Tokens with content: not blank, and not an end token.
        self._telling = np.array(
            [bool(model.piece(i).strip()) and not model.ends(i) for i in range(model.n_vocab)], dtype=np.bool_
        )
        # Tokens that may end a number or a text; computed when first needed
        self._ending: tuple[Allowed, Allowed] | None = None
        self._threads = [tasks.thread(f"masks {i}", self._run) for i in range(THREADS)]

    def compile(self, source: str, begun: Sequence[int] = ()) -> Compiled:
        """Compiles a grammar; takes up to some tenths of a second, without the GIL. Raises `TaskRefused`.

        source: llguidance's Lark form, or several as JSON, each of which begins with `NO_FORCING`. begun: tokens of the answer
        so far.
        """
        source, distinct = split(source)
        if not source.startswith("{"):
            source = NO_FORCING + source
        if len(source) > MAX_SOURCE:
            raise TaskRefused(f"The grammar is longer than {MAX_SOURCE} characters.", field="grammar")
        matcher = LLMatcher(
            self._vocabulary(), source, log_level=0, limits=_LIMITS
        )  # its errors quote the caller, so they must not be logged
        if matcher.is_error():
            raise GrammarTooLarge
        known = all(0 <= token < self._model.n_vocab for token in begun)
        if not known or matcher.try_consume_tokens(list(begun)) != len(begun):
            raise TaskRefused("The begun answer does not match the grammar.", field="begun")
        try:
            self._rehearse(matcher.deep_copy())
            watch = Watch(distinct) if distinct else None
            for token in begun if watch is not None else ():
                self.follow(watch, token)
            return Compiled(matcher, self.without_repeats(self.mask(matcher), watch), tuple(begun), watch)
        except GrammarTooCostly:
            raise GrammarTooLarge from None

    def constrain(self, compiled: Compiled) -> Constraint:
        """A constraint for one sequence."""
        return Constraint(compiled, self)

    def mask(self, matcher: LLMatcher) -> Allowed:
        """The tokens that may come next, including end tokens. Raises `GrammarTooCostly` if a limit is reached."""
        bits = np.zeros(self._words, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():  # the mask would then only allow the answer to end
            raise GrammarTooCostly("The grammar has too many ways on at one place. Simplify the schema.")
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._model.n_vocab].view(np.bool_)

    def follow(self, watch: Watch | None, token: int) -> None:
        """Adds a token to the watched answer."""
        if watch is not None and not self._model.ends(token):
            watch.feed(self._model.piece(token))

    def without_repeats(self, allowed: Allowed, watch: Watch | None) -> Allowed:
        """The allowed tokens, except those that would end an item that its list already has."""
        if watch is None or not watch.pending:
            return allowed
        for token in map(int, np.flatnonzero(allowed & self._ends_items()[watch.in_text])):
            if not self._model.ends(token) and not watch.probe().feed(self._model.piece(token)):
                allowed[token] = False
        return allowed

    def _ends_items(self) -> tuple[Allowed, Allowed]:
        with self._lock:
            if self._ending is None:
                pieces = [self._model.piece(i) for i in range(self._model.n_vocab)]
                self._ending = (
                    np.array([any(byte in ENDS_NUMBER for byte in piece) for piece in pieces], dtype=np.bool_),
                    np.array([ENDS_TEXT in piece for piece in pieces], dtype=np.bool_),
                )
            return self._ending

    def _rehearse(self, matcher: LLMatcher) -> None:
        """Consumes some arbitrary allowed tokens: most limits show at once, before anything runs."""
        for _ in range(REHEARSED):
            ways = np.flatnonzero(self.mask(matcher) & self._telling)
            if len(ways) == 0:
                return
            if not matcher.consume_token(int(ways[0])):
                raise GrammarTooCostly("The grammar reached one of its limits. Simplify the schema.")

    def want(self, constraint: Constraint) -> None:
        """Queues the constraint's mask for computation."""
        self._wanted.put((constraint.cost, next(self._numbers), constraint))

    def close(self) -> None:
        for _ in self._threads:
            self._wanted.put((_END, next(self._numbers), None))
        for thread in self._threads:
            thread.join(CLOSE_LIMIT)

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                ends = [token for token in range(self._model.n_vocab) if self._model.ends(token)]
                wrapper = TokenizerWrapper(_Pieces(self._model))
                self._tokenizer = LLTokenizer(wrapper, n_vocab=self._model.n_vocab, eos_token=ends)
            return self._tokenizer

    def _run(self) -> None:
        while (constraint := self._wanted.get()[2]) is not None:
            constraint.advance()


class Constraint:
    """One sequence's position in its grammar. The decode thread calls `accept` and `allowed`, a mask thread `advance`. `ready`
    decides whose turn it is.
    """

    def __init__(self, compiled: Compiled, masks: Masks) -> None:
        self._compiled = compiled
        self._masks = masks
        self._matcher = compiled.matcher.deep_copy()
        self._watch = None if compiled.watch is None else compiled.watch.copy()
        self._outcome: Allowed | EngineError = compiled.allowed
        self._token: int | None = None
        self._ready = threading.Event()
        self._ready.set()
        self._closed = False
        self.cost = 0.0  # seconds that its last mask took
        self.waiting: Callable[[], None] | None = None  # to call when the mask is ready, if the sequence waits for it

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether it is ready, after at most this many seconds; does not wait if its masks are slow."""
        return self._ready.wait(seconds if self.cost < GRACE else 0)

    def allowed(self) -> Allowed:
        """Raises `EngineError` if there is no mask and will be none."""
        if isinstance(self._outcome, EngineError):
            raise self._outcome
        return self._outcome

    def accept(self, token: int) -> None:
        """Adds `token`, which was allowed, to the answer. A mask thread computes what may follow."""
        self._ready.clear()
        self._token = token
        self._masks.want(self)

    def advance(self) -> None:
        """Computes what may follow."""
        if not self._closed:
            began = time.thread_time()
            try:
                self._outcome = self._next()
                self.cost = time.thread_time() - began
                self._compiled.charge(self.cost)
            except EngineError as error:
                self._outcome = error
            except BaseException:  # noqa: BLE001 - a panic of llguidance must end only its own sequence, not the shared thread
                self._outcome = EngineError("The grammar's next step failed.")
        self._ready.set()
        if (waiting := self.waiting) is not None:
            waiting()

    def _next(self) -> Allowed:
        if self._token is not None and not self._matcher.consume_token(self._token):
            raise GrammarTooCostly("The grammar reached one of its limits. Simplify the schema.")
        if self._token is not None:
            self._masks.follow(self._watch, self._token)
        return self._masks.without_repeats(self._masks.mask(self._matcher), self._watch)

    def close(self) -> None:
        self._closed = True
