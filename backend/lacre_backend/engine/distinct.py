"""Detects repeated items in lists of a JSON answer. It reads the answer byte by byte beside the grammar, which cannot track
texts.

Rules:
- A grammar's first lines name the lists: `//distinct /STEP/STEP`, the path from the answer's root; no steps for the root
  itself. Steps are percent-encoded. `*` is any member or item. A last step `#` means that the numbers are integers.
- Items are compared by value, because a grammar may allow two spellings of a control character.
- Items are texts and numbers without bounds, so an item that would repeat another can always be extended into a new one. Zeros
  cannot. A repeated zero is forbidden before its exponent, or before it begins if numbers are integers.
- A token is tried on a `probe`, which shares the lists with the watch. There is one probe per token that may end an item, so
  its cost must not grow with the answer.
- Pure: bytes in, verdicts out. The answer matches its grammar, so JSON syntax is not checked here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import unquote_to_bytes

MARK: Final = "//distinct "
ANY: Final = "*"
WHOLE: Final = "#"
_ANY, _WHOLE = b"\xff", b"\xfe"  # no name contains these bytes
_STEPS: Final = {ANY: _ANY, WHOLE: _WHOLE}
_QUOTE, _ESCAPE, _COMMA, _COLON, _ZERO = b'"\\,:0'
_OPENING: Final = b"{["
_CLOSING: Final = b"}]"
_ESCAPED: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: Final = frozenset({b"true", b"false", b"null"})  # items of other lists
_PARTS_OF_LITERALS: Final = frozenset({b"tru", b"fals"})  # their `e` does not begin an exponent
# Bytes that may end an item or make it equal to another. For a text: its quote. For a number: any byte after it, its exponent,
# or a zero.
ENDS_TEXT: Final = b'"'
_AFTER_NUMBER: Final = b'",]} \n\r\t'
_EXPONENT: Final = b"eE"
ENDS_NUMBER: Final = _AFTER_NUMBER + _EXPONENT + b"0"

Paths = frozenset[tuple[bytes, ...]]


def split(source: str) -> tuple[str, Paths]:
    """The grammar without the lines that name lists, and those lists."""
    paths = set()
    while source.startswith(MARK):
        line, _, source = source.partition("\n")
        steps = line.removeprefix(MARK).split("/")[1:]
        paths.add(tuple(_STEPS.get(step) or unquote_to_bytes(step) for step in steps))
    return source, frozenset(paths)


@dataclass(slots=True)
class _Open:
    """An open object or list. seen: the items of a watched list; None for any other. more: items that a probe adds. whole:
    whether its numbers are integers.
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
    """The state after an answer so far."""

    paths: Paths
    _open: list[_Open] = field(default_factory=list)
    _text: bytes = b""  # of the open scalar
    in_text: bool = False
    _escaped: bool = False
    _probes: bool = False

    def copy(self) -> Watch:
        """An independent copy."""
        return replace(self, _open=[replace(each, seen=None if each.seen is None else set(each.seen)) for each in self._open])

    def probe(self) -> Watch:
        """A copy to try one token on. The original must not advance until the probe is discarded."""
        return replace(self, _open=[*self._open[:-1], *map(replace, self._open[-1:])], _probes=True)

    @property
    def pending(self) -> bool:
        """Whether the next item could repeat an existing one."""
        return bool(self._open) and bool(self._open[-1].seen)

    def feed(self, data: bytes) -> bool:
        """Reads more of the answer. False if an item repeats another."""
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
        """False if the byte would fix a number at zero while its list already has a zero."""
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
        """Handles a complete scalar. Returns whether it is new in its list."""
        text, self._text = self._text, b""
        if not text or not self._open:
            return True
        within = self._open[-1]
        if within.wants_key:
            within.key, within.wants_key = _read(text[1:-1]), False
            return True
        if within.seen is None or text in _LITERALS:
            return True
        value = _read(text) if text.startswith(b'"') else float(text)  # 1 and 1e0 are the same number
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
