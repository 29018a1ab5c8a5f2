"""Answers drawn at random from what a grammar admits: every kind of value comes up, as a model would hardly write it."""

from __future__ import annotations

import random
from typing import Final

import numpy as np
from llguidance import LLMatcher

from lacre_backend.api.schema.patterns import byte_tokenizer
from lacre_backend.engine.distinct import Watch, split

_END: Final = 256
_BYTES: Final = 257
_WORDS: Final = (_BYTES + 31) // 32
# What ends a string, a list, an object or a number; without a liking for them an answer never ends.
_CLOSING: Final = np.isin(np.arange(_BYTES), [_END, *b'"]},'])
_BLANK: Final = np.isin(np.arange(_BYTES), list(b" \n\r\t"))
_PLAIN: Final = np.isin(np.arange(_BYTES), list(b"abcxyzABZ0123456789_-"))


class Unfinished(Exception):
    """The answer did not end within its limit."""


def drawn(grammar: str, seed: int, limit: int = 3000) -> str:
    """One answer. Raises `Unfinished`."""
    grammar, distinct = split(grammar)
    watch = Watch(distinct)
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    chance = np.random.default_rng(seed)
    eager = random.Random(seed).choice([0.2, 0.5, 0.8])
    out: list[int] = []
    while len(out) < limit:
        bits = np.zeros(_WORDS, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        assert not matcher.is_error(), matcher.get_error()
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:_BYTES].astype(bool)
        if watch.pending:
            allowed &= np.array([i == _END or not allowed[i] or watch.probe().feed(bytes([i])) for i in range(_BYTES)])
        ways = np.flatnonzero(allowed & ~_BLANK)
        if len(ways) == 0:
            ways = np.flatnonzero(allowed)
        if len(ways) == 0:
            break
        closing, plain = ways[_CLOSING[ways]], ways[_PLAIN[ways]]
        late = len(out) > 400
        if len(closing) and (late or chance.random() < eager):
            ways = closing
        elif len(plain) and chance.random() < 0.8:
            ways = plain
        token = int(chance.choice(ways))
        if token == _END:
            break
        assert matcher.consume_token(token)
        assert watch.feed(bytes([token]))
        out.append(token)
    if not matcher.is_accepting():
        raise Unfinished(bytes(out).decode("utf-8", "replace"))
    return bytes(out).decode()
