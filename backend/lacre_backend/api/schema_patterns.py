"""Patterns of JSON schemas (ECMA-262, the part that is regular), as regular expressions of a grammar.

Rules
- A pattern is found anywhere in a text, unless its own anchors say otherwise.
- What is not regular, or means something else elsewhere, is refused: look-around, references back, word boundaries.
- A caller's pattern never meets Python's own matcher, which backtracks and would take for ever; llguidance's takes linear time.
- Nothing of one request's patterns is kept for another's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_PATTERN: Final = 1000  # characters
MAX_SEARCHES: Final = 5000  # of patterns in names and values; each takes some 20 microseconds
_CLASSES: Final = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v\u00a0\ufeff\u2028\u2029"}
_NEGATED: Final = {"D": "d", "W": "w", "S": "s"}
_CONTROLS: Final = frozenset("tnrfv")
_ANY: Final = "(?s:.*)"
_END: Final = 256  # the token that ends a text, after one for each byte
_LIMITS: Final = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, max_lexer_states=5000, verbose_errors=False)


class NotRegular(ValueError):
    """A pattern that is not taken."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """body: without anchors, in Rust's syntax. begins, ends: whether it is anchored."""

    body: str
    begins: bool
    ends: bool

    @property
    def whole(self) -> str:
        """An expression of the whole text in which the pattern is found."""
        return f"{'' if self.begins else _ANY}({self.body}){'' if self.ends else _ANY}"


class Patterns:
    """The patterns of one schema."""

    def __init__(self) -> None:
        self._read: dict[str, Pattern] = {}
        self._matchers: dict[str, LLMatcher] = {}
        self._searches = 0

    def read(self, pattern: str) -> Pattern:
        """Raises `NotRegular`."""
        if pattern not in self._read:
            self._read[pattern] = _read(pattern)
        return self._read[pattern]

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a pattern is found in a text. Raises `NotRegular`."""
        self._searches += 1
        if self._searches > MAX_SEARCHES:
            raise NotRegular(f"is to be sought more than {MAX_SEARCHES} times in names and values")
        if pattern not in self._matchers:
            expression = self.read(pattern).whole
            matcher = LLMatcher(byte_tokenizer(), LLMatcher.grammar_from_regex(expression), log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise NotRegular("is no regular expression, or too large")
            self._matchers[pattern] = matcher
        matcher, read = self._matchers[pattern].deep_copy(), list(text.encode())
        found = matcher.try_consume_tokens(read) == len(read) and matcher.is_accepting()
        if matcher.is_error():
            raise NotRegular("is too large")
        return found


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A vocabulary of bytes."""

    tokens: Sequence[bytes] = field(default_factory=lambda: [*(bytes([i]) for i in range(_END)), b"\xff<end>"])
    special_token_ids: Sequence[int] = (_END,)
    eos_token_id: int = _END
    bos_token_id: None = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=_END + 1)


def _read(pattern: str) -> Pattern:
    if len(pattern) > MAX_PATTERN:
        raise NotRegular(f"is longer than {MAX_PATTERN} characters")
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    body = _Reader(inner).read()
    if (begins or ends) and _alternates(inner):
        raise NotRegular("has an anchor in one of its alternatives; put them into a group")
    return Pattern(body, begins, ends)


def _alternates(body: str) -> bool:
    depth, i, quoted = 0, 0, False
    while i < len(body):
        match body[i]:
            case "\\":
                i += 1
            case "[":
                quoted = True
            case "]":
                quoted = False
            case "(" if not quoted:
                depth += 1
            case ")" if not quoted:
                depth -= 1
            case "|" if not quoted and depth == 0:
                return True
        i += 1
    return False


class _Reader:
    """One pattern, character by character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> str:
        out = []
        while self._at < len(self._text):
            out.append(self._one())
        return "".join(out)

    def _next(self, n: int = 1) -> str:
        taken = self._text[self._at : self._at + n]
        if len(taken) < n:
            raise NotRegular("ends too soon")
        self._at += n
        return taken

    def _one(self) -> str:
        match character := self._next():
            case "\\":
                return self._escape(inside=False)
            case "[":
                return self._set()
            case "^" | "$":
                raise NotRegular("has an anchor in its middle")
            case ".":
                return r"[^\n\r\u2028\u2029]"
            case "(":
                return self._group()
            case "*" | "+" | "?" | "}":
                if self._text[self._at : self._at + 1] in ("?", "+"):
                    self._at += self._text[self._at] == "?"  # greed does not matter to what is matched
                return character
            case "/":
                return r"\x2f"
        return character if character in "|){" else _plain(character)

    def _group(self) -> str:
        if self._text[self._at : self._at + 1] != "?":
            return "(?:"
        if self._text[self._at : self._at + 2] == "?:":
            self._at += 2
            return "(?:"
        named = re.match(r"\?<[A-Za-z_]\w*>", self._text[self._at :])
        if named is None:
            raise NotRegular("looks around, which no grammar can")
        self._at += named.end()
        return "(?:"

    def _escape(self, *, inside: bool) -> str:
        character = self._next()
        if character in _CLASSES:
            return _CLASSES[character] if inside else f"[{_CLASSES[character]}]"
        if character in _NEGATED and not inside:
            return f"[^{_CLASSES[_NEGATED[character]]}]"
        if character in _CONTROLS:
            return f"\\{character}"
        if character == "x":
            return _plain(chr(self._hex(2)))
        if character == "u":
            return _plain(chr(self._hex(4)))
        if character.isalnum():
            raise NotRegular(f"uses \\{character}, which is not supported")
        return _plain(character)

    def _hex(self, n: int) -> int:
        try:
            code = int(self._next(n), 16)
        except ValueError:
            raise NotRegular("has an escape without its digits") from None
        if 0xD800 <= code <= 0xDFFF:
            raise NotRegular("names half a character")
        return code

    def _set(self) -> str:
        out = "["
        if self._text[self._at : self._at + 1] == "^":
            self._at += 1
            out = "[^"
        if self._text[self._at : self._at + 1] == "]":
            raise NotRegular("has an empty set")
        while (character := self._next()) != "]":
            if character == "\\":
                out += self._escape(inside=True)
            else:
                out += "-" if character == "-" else _plain(character)
        return out + "]"


def _plain(character: str) -> str:
    """A character that stands for itself, in and outside of sets."""
    code = ord(character)
    if character.isalnum() or character in " _,:;=!@%~<>'":
        return character
    return f"\\x{code:02x}" if code < 0x80 else character
