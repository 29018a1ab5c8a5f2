"""Formats and patterns of strings (JSON Schema Validation, draft 2020-12, sections 6.3.3 and 7).

Rules:
- A format is a constraint. Enforcing a stricter form is allowed: only one of a format's notations may be admitted. So dates are
  those that every library reads: calendar dates from the year 1 on, without leap seconds.
- A format that only names a text's purpose is no constraint.
- zod's own format names are accepted beside the pattern that they stand for, and refused alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from lacre_backend.api.schema.terms import Case, Place, Unknown

# Formats that llguidance supports itself.
FORMATS: Final = {name: name for name in ("email", "hostname", "ipv4", "ipv6", "uuid", "uri")}
FORMATS.update({"idn-email": "email", "idn-hostname": "hostname", "iri": "uri", "iri-reference": "uri", "uri-reference": "uri"})
# Narrower versions of them, to combine with other constraints.
_HOST: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?){1,4}"
_BYTE: Final = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"{_BYTE}(\.{_BYTE}){{3}}"
_IPV6: Final = r"([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}"
_UUID: Final = "[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{0}[0-9a-fA-F]{{3}}-{1}[0-9a-fA-F]{{3}}-[0-9a-fA-F]{{12}}"
NARROWER: Final = {
    "email": rf"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}$",
    "hostname": f"^{_HOST}$",
    "ipv4": f"^{_IPV4}$",
    "ipv6": f"^{_IPV6}$",
    "uuid": f"^{_UUID.format('[0-9a-fA-F]', '[0-9a-fA-F]')}$",
    "uri": rf"^https?://{_HOST}(/[A-Za-z0-9._~-]+)*/?$",
}
_YEAR: Final = r"([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR: Final = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAYS: Final = r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_DATE: Final = f"({_YEAR}-{_DAYS}|{_LEAP_YEAR}-02-29)"
_CLOCK: Final = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME: Final = rf"{_CLOCK}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_CLOCK})"
_HOURS: Final = "T([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S)"
_LONG: Final = "([0-9]{1,3}Y([0-9]{1,3}M([0-9]{1,4}D)?)?|[0-9]{1,3}M([0-9]{1,4}D)?|[0-9]{1,4}D)"
_JSON_POINTER: Final = r"(/([^~/\x00-\x1f]|~[01])*)*"
_BASE64: Final = r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?"
PATTERN_FORMATS: Final = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": f"^P([0-9]{{1,4}}W|{_LONG}({_HOURS})?|{_HOURS})$",
    "json-pointer": f"^{_JSON_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]{{0,8}})(#|{_JSON_POINTER})$",
    "uri-template": r"^[A-Za-z0-9._~:/?#@!$&()*+,;=-]*$",
    "regex": r"^[A-Za-z0-9 _-]*$",
    # pydantic's
    **{f"uuid{n}": f"^{_UUID.format(n, '[89abAB]')}$" for n in range(1, 9)},
    "ipv4network": rf"^{_BYTE}(\.{_BYTE}){{2}}\.0/24$",
    "ipv4interface": rf"^{_IPV4}/(3[0-2]|[12]?[0-9])$",
    "ipv6network": "^[1-9a-f][0-9a-f]{0,3}:[0-9a-f]{1,4}::/(32|48|64)$",
    "ipv6interface": f"^{_IPV6}/(12[0-8]|1[01][0-9]|[1-9]?[0-9])$",
    "ipvanyaddress": f"^{_IPV4}$",
    "ipvanynetwork": rf"^{_BYTE}(\.{_BYTE}){{2}}\.0/24$",
    "ipvanyinterface": rf"^{_IPV4}/(3[0-2]|[12]?[0-9])$",
    "name-email": NARROWER["email"],
    "json-string": "^(true|false|null|0|[1-9][0-9]{0,8})$",
    "color": "^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})$",
    "base64": f"^{_BASE64}$",
    "byte": f"^{_BASE64}$",
    "base64url": "^([A-Za-z0-9_-]{4})*([A-Za-z0-9_-][AQgw]==|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048]=)?$",
    "guid": f"^{_UUID.format('[0-9a-fA-F]', '[0-9a-fA-F]')}$",
    "e164": r"^\+[1-9][0-9]{6,14}$",
    "cidrv4": rf"^{_IPV4}/(3[0-2]|[12]?[0-9])$",
}  # fmt: skip
# Names that do not constrain the text.
_SAYS_NOTHING: Final = frozenset(
    {"password", "binary", "path", "file-path", "directory-path", "new-path", "textarea", "markdown"}
)
# zod's names, which come with a pattern.
_BY_PATTERN: Final = frozenset(
    {"base64", "base64url", "cidrv4", "cidrv6", "cuid", "cuid2", "e164", "emoji", "guid", "jwt", "ksuid", "mac", "nanoid",
     "template_literal", "ulid", "xid", "hex", "regex", "starts_with", "ends_with", "includes", "lowercase", "uppercase"}
)  # fmt: skip


def of_string(unknown: Unknown, keyword: str, place: Place, case: Case) -> Case:
    """Applies `pattern` or `format`, whose value is a string."""
    value: str = place.schema[keyword]
    if keyword == "pattern":
        return replace(case, patterns=(*case.patterns, (value, True)))
    if value in _SAYS_NOTHING or (value in _BY_PATTERN and _has_pattern(place)):
        return case
    if value in PATTERN_FORMATS:
        return replace(case, patterns=(*case.patterns, (PATTERN_FORMATS[value], True)))
    if value not in FORMATS:
        unknown(keyword, place, f"is not one of {', '.join([*FORMATS, *PATTERN_FORMATS])}")
        return case
    return replace(case, formats=(*case.formats, FORMATS[value]))


def _has_pattern(place: Place) -> bool:
    every = place.schema.get("allOf")
    return "pattern" in place.schema or (isinstance(every, list) and any(isinstance(e, dict) and "pattern" in e for e in every))
