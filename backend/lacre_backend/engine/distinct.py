"""Lists of a JSON answer whose items differ: read byte by byte, beside the grammar, which keeps no record of texts.

Rules
- A grammar's first lines say which lists these are: `//distinct /STEP/STEP`, the names on the way from the answer's root; none
  for the root itself. Each is percent-encoded; `*` is any member or item. A last step `#` says that its numbers are whole.
- Items are compared by what they mean, for a grammar may admit two spellings of a control character.
- Items are texts and numbers without bounds, so an item that would be there twice can always go on and become another. Zeros
  cannot: one is forbidden before its exponent, or before it begins where numbers are whole.
- What a token would do is tried on a `probe`, which shares the lists with the watch. There is one for each token that may end
  an item, so its cost must not grow with the answer.
- Pure: bytes in, verdicts out. What is read is an answer that its grammar admits, so no form of JSON is checked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import unquote_to_bytes

MARK: Final = "//distinct "
ANY: Final = "*"
WHOLE: Final = "#"
_ANY, _WHOLE = b"\xff", b"\xfe"  # no name has these
_STEPS: Final = {ANY: _ANY, WHOLE: _WHOLE}
_QUOTE, _ESCAPE, _COMMA, _COLON, _ZERO = b'"\\,:0'
_OPENING: Final = b"{["
_CLOSING: Final = b"}]"
_ESCAPED: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: Final = frozenset({b"true", b"false", b"null"})  # these are items of other lists
_PARTS_OF_LITERALS: Final = frozenset({b"tru", b"fals"})  # their `e` is no exponent's
# What may end an item, or make it one that is there: a text by its quote; a number by what follows it, its exponent or a zero.
ENDS_TEXT: Final = b'"'
_AFTER_NUMBER: Final = b'",]} \n\r\t'
_EXPONENT: Final = b"eE"
ENDS_NUMBER: Final = _AFTER_NUMBER + _EXPONENT + b"0"

Paths = frozenset[tuple[bytes, ...]]


def split(source: str) -> tuple[str, Paths]:
    """A grammar without the lines that name lists, and those."""
    paths = set()
    while source.startswith(MARK):
        line, _, source = source.partition("\n")
        steps = line.removeprefix(MARK).split("/")[1:]
        paths.add(tuple(_STEPS.get(step) or unquote_to_bytes(step) for step in steps))
    return source, frozenset(paths)


@dataclass(slots=True)
class _Open:
    """An object or a list that has begun. seen: the items of a list whose items differ; None for any other. more: those that a
    probe adds. whole: its numbers are.
    """

    path: tuple[bytes, ...]
    is_object: bool
    key: bytes = b""
    wants_key: bool = False
    seen: set[object] | None = None
    more: tuple[object, ...] = ()
    whole: bool = False


@dataclass(slots=True)
class Watch:
    """An answer so far."""

    paths: Paths
    _open: list[_Open] = field(default_factory=list)
    _text: bytes = b""  # of the scalar that has begun
    in_text: bool = False
    _escaped: bool = False
    _probes: bool = False

    def copy(self) -> Watch:
        """One that reads on by itself."""
        return replace(self, _open=[replace(each, seen=None if each.seen is None else set(each.seen)) for each in self._open])

    def probe(self) -> Watch:
        """One to try a token on; this one must not read on before it is done with."""
        return replace(self, _open=[*self._open[:-1], *map(replace, self._open[-1:])], _probes=True)

    @property
    def pending(self) -> bool:
        """Whether the next item could be one that is there already."""
        return bool(self._open) and bool(self._open[-1].seen)

    def feed(self, data: bytes) -> bool:
        """More of the answer. False where an item is there twice."""
        new = True
        for byte in data:
            new = self._byte(byte) and new
        return new

    def _byte(self, byte: int) -> bool:
        if self.in_text:
            return self._of_text(byte)
        if byte == _QUOTE:
            self._text, self.in_text = b'"', True
            return True
        if byte not in _AFTER_NUMBER and byte not in _OPENING and byte != _COLON:
            before, self._text = self._text, self._text + bytes([byte])
            return before in _PARTS_OF_LITERALS or self._may_follow(before, byte)
        new = self._ended()
        if byte in _OPENING:
            self._begin(is_object=byte == _OPENING[0])
        elif byte in _CLOSING:
            self._open.pop()
            self._open[-1:] = map(replace, self._open[-1:]) if self._probes else self._open[-1:]
        elif byte == _COMMA and self._open:
            self._open[-1].wants_key = self._open[-1].is_object
        return new

    def _may_follow(self, text: bytes, byte: int) -> bool:
        """False where it makes a number a zero for good, and its list has one."""
        within = self._open[-1] if self._open else None
        if within is None or within.seen is None or not (0.0 in within.seen or 0.0 in within.more):
            return True
        begins = within.whole and byte == _ZERO and text in (b"", b"-")
        return not begins and not (byte in _EXPONENT and float(text) == 0)

    def _of_text(self, byte: int) -> bool:
        self._text += bytes([byte])
        if self._escaped:
            self._escaped = False
        elif byte == _ESCAPE:
            self._escaped = True
        elif byte == _QUOTE:
            self.in_text = False
            return self._ended()
        return True

    def _begin(self, *, is_object: bool) -> None:
        path = (*self._open[-1].path, self._step()) if self._open else ()
        found = [each for each in self.paths if not is_object and _matches(_place(each), path)]
        whole = bool(found) and all(each[-1:] == (_WHOLE,) for each in found)
        self._open.append(_Open(path, is_object, wants_key=is_object, seen=set() if found else None, whole=whole))

    def _step(self) -> bytes:
        return self._open[-1].key if self._open[-1].is_object else _ANY

    def _ended(self) -> bool:
        """A scalar is whole. Answers whether it is new in its list."""
        text, self._text = self._text, b""
        if not text or not self._open:
            return True
        within = self._open[-1]
        if within.wants_key:
            within.key, within.wants_key = _read(text[1:-1]), False
            return True
        if within.seen is None or text in _LITERALS:
            return True
        value = _read(text) if text.startswith(b'"') else float(text)  # 1 and 1e0 are one number
        if value in within.seen or value in within.more:
            return False
        if self._probes:
            within.more = (*within.more, value)
        else:
            within.seen.add(value)
        return True


def _read(text: bytes) -> bytes:
    """Without escapes, in UTF-8."""
    if b"\\" not in text:
        return text
    units = _ESCAPED.sub(lambda match: chr(int(match[1], 16)) if match[1] else _SHORT.get(match[2], match[2]), text.decode())
    return units.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")


def _place(path: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return path[:-1] if path[-1:] == (_WHOLE,) else path


def _matches(wanted: tuple[bytes, ...], path: tuple[bytes, ...]) -> bool:
    return len(wanted) == len(path) and all(each in (_ANY, step) for each, step in zip(wanted, path, strict=True))
