"""What the control data and the fields of a message may hold (RFC 9110 sections 5 and 9, RFC 9113 sections 8.2 and 8.3).

Both directions apply the same rules: this side refuses to write what it refuses to read. Every rule keeps out bytes that
another program could read differently: a line break, a second meaning of a length, a name in capitals. Errors never quote the
offending bytes, which may be part of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from lacre import errors

Fields = tuple[tuple[str, str], ...]

# The longest registered method has 16 letters.
MAX_METHOD: Final = 32
MAX_SCHEME: Final = 8
# A host name has at most 253 characters (RFC 1035), a port 6 with its colon.
MAX_AUTHORITY: Final = 264
# RFC 9110 section 4.1 asks for at least 8000.
MAX_PATH: Final = 8192
MAX_NAME: Final = 256
# A receipt in a trailer has under 1 KiB; the rest is room for what applications send.
MAX_VALUE: Final = 16384
MAX_FIELDS: Final = 128
MAX_HEADER_SECTION: Final = 65536
MAX_TRAILER_SECTION: Final = 32768

# A token of RFC 9110 section 5.6.2, without capitals: RFC 9113 section 8.2.1. This excludes pseudo-fields too.
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# RFC 9110 section 5.5: no control characters but the tab, no space or tab at either end.
_VALUE: Final = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_AUTHORITY: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]\-]*")  # RFC 3986 section 3.2, without user information
_PATH: Final = re.compile(rb"/[\x21\x22\x24-\x7e]*|\*")  # visible ASCII without `#`; `*` is for OPTIONS
_LENGTH: Final = re.compile(r"[0-9]{1,15}")
# RFC 9113 section 8.2.2: they describe a connection, and there is none inside the seal.
_CONNECTION_FIELDS: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


def check_control(method: bytes, scheme: bytes, authority: bytes, path: bytes) -> None:
    """Raises InvalidMessage or MessageTooLarge."""
    for part, limit in ((method, MAX_METHOD), (scheme, MAX_SCHEME), (authority, MAX_AUTHORITY), (path, MAX_PATH)):
        if len(part) > limit:
            raise errors.MessageTooLarge(f"the method, scheme, authority or path is longer than {limit} bytes")
    if not _METHOD.fullmatch(method) or method == b"CONNECT":
        raise errors.InvalidMessage("this method cannot be sealed")
    if scheme not in (b"https", b"http"):
        raise errors.InvalidMessage("the scheme is neither https nor http")
    if not _AUTHORITY.fullmatch(authority):
        raise errors.InvalidMessage("the authority holds a character that is not allowed there")
    if not _PATH.fullmatch(path):
        raise errors.InvalidMessage("the path does not begin with a slash, or holds a character that must be escaped")


def check_field(name: bytes, value: bytes) -> tuple[str, str]:
    """One field line, as text. Values are Latin-1, so every byte that HTTP allows survives the round trip."""
    if len(name) > MAX_NAME or len(value) > MAX_VALUE:
        raise errors.MessageTooLarge(f"a field has a name above {MAX_NAME} bytes or a value above {MAX_VALUE}")
    if not _NAME.fullmatch(name):
        raise errors.InvalidMessage("a field name is empty or holds a character that is not allowed there")
    if not _VALUE.fullmatch(value):
        raise errors.InvalidMessage("a field value holds a control character, or begins or ends with a space")
    if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):
        raise errors.InvalidMessage("a field that describes a connection has no place in a sealed message")
    return name.decode("ascii"), value.decode("latin-1")


def content_length(headers: Iterable[tuple[str, str]]) -> int | None:
    """The value of Content-Length; a message that contradicts it is malformed (RFC 9113 section 8.1.1)."""
    values = list(dict.fromkeys(value for name, value in headers if name == "content-length"))
    if not values:
        return None
    if len(values) > 1 or not _LENGTH.fullmatch(values[0]):
        raise errors.InvalidMessage("the Content-Length is not one number")
    return int(values[0])
