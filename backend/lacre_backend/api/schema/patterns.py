"""Patterns of JSON schemas (the regular part of ECMA-262) as regular expressions of a grammar.

Rules:
- A pattern may match anywhere in a text, unless its own anchors say otherwise.
- A lookahead is a second expression for the rest of the text. `A(?=B)C` is A, then a text that matches
  both C and B followed by anything. Inside a repetition the rest is ambiguous, so it is refused there.
- Constructs that are not regular or differ between engines are refused: lookbehinds, backreferences, word boundaries.
- A caller's pattern never reaches Python's own matcher, which backtracks and could run forever. llguidance takes linear time.
- Nothing of one request's patterns is kept for another request.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_PATTERN: Final = 1000  # characters
MAX_SEARCHES: Final = 5000  # of patterns in names and values; each takes about 20 microseconds
_CLASSES: Final = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v\u00a0\ufeff\u2028\u2029"}
_NEGATED: Final = {"D": "d", "W": "w", "S": "s"}
MAX_BRANCHES: Final = 64  # of one pattern after splitting at anchors and lookaheads; real patterns have a handful
_CONTROLS: Final = frozenset("tnrfv")
_ANY: Final = "(?s:.*)"
_END: Final = 256  # the token that ends a text, after one for each byte
_LIMITS: Final = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, max_lexer_states=5000, verbose_errors=False)


class NotRegular(ValueError):
    """A pattern that is not supported."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern.

    expression: for a whole text that contains the pattern, as grammar terminals are written. plain: whether llguidance's own
    pattern parser reads it the same way.
    """

    expression: str
    plain: bool


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
        """Whether a pattern matches somewhere in a text. Raises `NotRegular`."""
        self._searches += 1
        if self._searches > MAX_SEARCHES:
            raise NotRegular(f"is searched more than {MAX_SEARCHES} times in names and values")
        if pattern not in self._matchers:
            grammar = f"start: WHOLE\nWHOLE: {self.read(pattern).expression}\n"
            matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise NotRegular("is not a valid regular expression, or too large")
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


# A pattern's parts: expressions in Rust's syntax, lookaheads, and the two anchors.


@dataclass(frozen=True, slots=True)
class _Look:
    """A lookahead: the following text must begin (or must not begin) with one of the branches."""

    branches: tuple[_Branch, ...]
    holds: bool


_BEGIN: Final = "^"
_END_OF_TEXT: Final = "$"
_Part = str | _Look  # an anchor is its own text; no other part is spelled like that
_Branch = tuple[_Part, ...]


def _read(pattern: str) -> Pattern:
    if len(pattern) > MAX_PATTERN:
        raise NotRegular(f"is longer than {MAX_PATTERN} characters")
    reader = _Reader(pattern)
    branches = reader.whole()
    found = [_text(branch) for branch in branches]
    whole = found[0] if len(found) == 1 else " | ".join(f"({each})" for each in found)
    return Pattern(whole, reader.plain and len(branches) == 1 and _anchored_at_its_ends(pattern, branches[0]))


def _anchored_at_its_ends(pattern: str, branch: _Branch) -> bool:
    """Whether it has no lookaheads, and anchors only at the pattern's own ends."""
    ends = pattern.endswith("$") and not pattern.endswith("\\$")
    anchors = (branch.count(_BEGIN), branch.count(_END_OF_TEXT))
    return anchors == (pattern.startswith("^"), ends) and not any(isinstance(part, _Look) for part in branch)


def _text(branch: _Branch, *, ahead: bool = False, at_start: bool = False) -> str:
    """A text that contains the branch. ahead: it begins with the branch, as in a lookahead. at_start: it is at the start of the
    text.
    """
    consuming = [i for i, part in enumerate(branch) if part not in (_BEGIN, _END_OF_TEXT) and not isinstance(part, _Look)]
    begins = [i for i, part in enumerate(branch) if part == _BEGIN]
    ends = [i for i, part in enumerate(branch) if part == _END_OF_TEXT]
    if any(consuming and i > consuming[0] for i in begins) or any(consuming and i < consuming[-1] for i in ends):
        raise NotRegular("has an anchor in its middle")
    anchored, at_start = ahead or bool(begins), at_start or bool(begins)
    expression, regular = ("" if ends else _ANY), True  # built from the last part backwards; regular: still a single expression
    for i, part in reversed(list(enumerate(branch))):
        if isinstance(part, _Look):
            first = at_start and not (consuming and consuming[0] < i)
            looked = " | ".join(f"({_ahead(each, at_start=first)})" for each in part.branches)
            this = _terminal(expression) if regular else f"({expression})"
            expression, regular = f"{this} & {'' if part.holds else '~'}({looked})", False
        elif part not in (_BEGIN, _END_OF_TEXT):
            expression = f"{part}{expression}" if regular else f"{_terminal(part)} ({expression})"
    if not anchored:
        expression = f"{_ANY}{expression}" if regular else f"/{_ANY}/ ({expression})"
    return _terminal(expression) if regular else expression


def _terminal(expression: str) -> str:
    return f"/{expression}/" if expression else '""'


def _ahead(branch: _Branch, *, at_start: bool) -> str:
    if _BEGIN in branch and not at_start:
        raise NotRegular("has an anchor in its middle")
    return _text(branch, ahead=True, at_start=at_start)


class _Reader:
    """Parses one pattern, character by character. Groups without anchors and lookaheads stay one expression; others become
    branches.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.plain = True  # whether other parsers read all of it the same way

    def whole(self) -> list[_Branch]:
        branches = self._branches()
        if self._at < len(self._text):
            raise NotRegular("closes a group that it does not open")
        return branches

    def _branches(self) -> list[_Branch]:
        """Parses to the end of the group or of the pattern."""
        found = self._sequence()
        while self._peek() == "|":
            self._at += 1
            found += self._sequence()
            _few(found)
        return _merged(found)

    def _sequence(self) -> list[_Branch]:
        found: list[_Branch] = [()]
        while (character := self._peek()) and character not in "|)":
            parts = self._quantified(self._one())
            found = [(*before, *after) for before, after in itertools.product(found, parts)]
            _few(found)
        return [_joined(branch) for branch in found]

    def _quantified(self, branches: list[_Branch]) -> list[_Branch]:
        quantifier = re.match(r"[*+?]|\{[0-9]{1,4}(,[0-9]{0,4})?\}", self._text[self._at :])
        if quantifier is None:
            return branches
        self._at += quantifier.end()
        if self._peek() == "?":
            self._at += 1  # greediness does not change what matches
        written = quantifier.group()
        if len(branches) == 1 and len(branches[0]) == 1 and _is_expression(branches[0][0]):
            return [(f"{branches[0][0]}{written}",)]
        if branches == [()]:
            return branches
        if written not in ("?", "{0,1}", "{1}", "{1,1}"):
            raise NotRegular("repeats an anchor or a lookahead")
        return branches + ([()] if written in ("?", "{0,1}") else [])

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self, n: int = 1) -> str:
        taken = self._text[self._at : self._at + n]
        if len(taken) < n:
            raise NotRegular("ends too soon")
        self._at += n
        return taken

    def _one(self) -> list[_Branch]:
        match character := self._next():
            case "\\":
                return [(self._escape(inside=False),)]
            case "[":
                return [(self._set(),)]
            case "^" | "$":
                return [(character,)]
            case ".":
                return [(r"[^\n\r\u2028\u2029]",)]
            case "(":
                return self._group()
            case "*" | "+" | "?":
                raise NotRegular("repeats nothing")
        return [(_plain(character),)]

    def _group(self) -> list[_Branch]:
        opened = re.match(r"\?(:|=|!|P?<[A-Za-z_]\w*>)", self._text[self._at :])
        if opened is None and self._peek() == "?":
            raise NotRegular("has a lookbehind or sets flags, which is not supported")
        self._at += 0 if opened is None else opened.end()
        inside = self._branches()
        if self._next() != ")":
            raise NotRegular("does not close a group")
        kind = "" if opened is None else opened.group(1)
        if kind in ("=", "!"):
            return [(_Look(tuple(inside), kind == "="),)]
        if len(inside) == 1 and all(_is_expression(part) for part in inside[0]):
            return [(f"(?:{''.join(map(str, inside[0]))})",)]
        return inside

    def _escape(self, *, inside: bool) -> str:
        character = self._next()
        if character in _CLASSES:
            return _CLASSES[character] if inside else f"[{_CLASSES[character]}]"
        if character in _NEGATED:  # within a set, it is a nested set
            return f"[^{_CLASSES[_NEGATED[character]]}]"
        if character in _CONTROLS:
            return f"\\{character}"
        if character == "x":
            return _plain(chr(self._hex(2)))
        if character == "u":
            return _plain(chr(self._code()))
        if character in "pP":
            return self._property(character)
        if character.isalnum():
            raise NotRegular(f"uses \\{character}, which is not supported")
        return _plain(character)

    def _code(self) -> int:
        braced = re.match(r"\{([0-9a-fA-F]{1,6})\}", self._text[self._at :])
        if braced is None:
            return self._hex(4)
        self._at += braced.end()
        code = int(braced.group(1), 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise NotRegular("has an invalid code point")
        return code

    def _property(self, letter: str) -> str:
        named = re.match(r"\{[A-Za-z_=]{1,40}\}", self._text[self._at :])
        if named is None:
            raise NotRegular("has a character property without a name")
        self._at += named.end()
        self.plain = False
        written = f"\\{letter}{named.group()}"
        if not _is_known(written):
            raise NotRegular(f"names an unknown character property, {named.group()}")
        return written

    def _hex(self, n: int) -> int:
        try:
            code = int(self._next(n), 16)
        except ValueError:
            raise NotRegular("has an escape without digits") from None
        if 0xD800 <= code <= 0xDFFF:
            raise NotRegular("names a lone surrogate")
        return code

    def _set(self) -> str:
        out = "["
        if self._peek() == "^":
            self._at += 1
            out = "[^"
        if self._peek() == "]":
            raise NotRegular("has an empty set")
        while (character := self._next()) != "]":
            if character == "\\":
                out += self._escape(inside=True)
            else:
                out += "-" if character == "-" else _plain(character)
        return out + "]"


def _few(branches: Sequence[_Branch]) -> None:
    if len(branches) > MAX_BRANCHES:
        raise NotRegular(f"has more than {MAX_BRANCHES} alternatives around its anchors and lookaheads")


def _is_expression(part: _Part) -> bool:
    return not isinstance(part, _Look) and part not in (_BEGIN, _END_OF_TEXT)


def _joined(branch: _Branch) -> _Branch:
    """Joins consecutive expressions."""
    found: list[_Part] = []
    for part in branch:
        last = found[-1] if found else None
        if isinstance(part, str) and isinstance(last, str) and _is_expression(part) and _is_expression(last):
            found[-1] = last + part
        else:
            found.append(part)
    return tuple(found)


def _merged(branches: Sequence[_Branch]) -> list[_Branch]:
    """Joins alternatives without anchors and lookaheads into one expression."""
    simple = ["".join(map(str, branch)) for branch in branches if all(map(_is_expression, branch))]
    others = [branch for branch in branches if not all(map(_is_expression, branch))]
    if not simple:
        return others
    return [(f"(?:{'|'.join(simple)})" if len(simple) > 1 or others else simple[0],), *others]


def _is_known(written: str) -> bool:
    """Whether Rust's regular expressions support this property."""
    return not LLMatcher(byte_tokenizer(), f"start: /{written}/", log_level=0, limits=_LIMITS).is_error()


def _plain(character: str) -> str:
    """A character that matches itself, inside and outside of sets."""
    code = ord(character)
    if character.isalnum() or character in " _,:;=!@%<>'":
        return character
    return f"\\x{code:02x}" if code < 0x80 else character
