"""Versions of the formats in which programs of two versions of Lacre meet. docs/upgrades.md lists them all.

Rules:
- A format grows by members and headers that older readers ignore. That changes no version: `v` stays away, which means 1.
- A change that an older reader would take wrongly raises the format's version. Its writer then says so: in the member `v` of a
  JSON object, or in the header `V` of a NATS message.
- A reader refuses a newer version than it knows, whole, with `NewerFormat`, which names the program to upgrade.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lacre.errors import InvalidMessage, NewerFormat
from lacre.jose.claims import Members
from lacre.runtime.json_objects import parse_object

MEMBER: Final = "v"
HEADER: Final = "V"
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Format:
    """name: as in docs/upgrades.md. reader: the program that reads it. version: the newest one that this code reads."""

    name: str
    reader: str
    version: int = 1

    def parse(self, data: bytes | bytearray, what: str = "") -> Members:
        """Raises InvalidMessage or NewerFormat. what: names it in other errors."""
        return self.members(parse_object(data, what or f"the {self.name}"), what)

    def members(self, said: Mapping[str, Any], what: str = "") -> Members:
        """Raises as `parse`."""
        self.check(said)
        return Members(said, what or f"the {self.name}")

    def check(self, said: Mapping[str, Any] | Members) -> None:
        """Raises as `parse`. said: the object, or its typed view."""
        version = said.get(MEMBER, 1)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidMessage(f"the {self.name}: member {MEMBER!r} must be the version of its format")
        self._known(version)

    def check_header(self, value: str | None) -> None:
        """Raises as `parse`. value: of the header `V`; None if there is none."""
        if value is None:
            return
        if not _NUMBER.fullmatch(value):
            raise InvalidMessage(f"the {self.name}: header {HEADER} must be the version of its format")
        self._known(int(value))

    def _known(self, version: int) -> None:
        if version > self.version:
            raise NewerFormat(
                f"the {self.name} is in version {version} of its format, and this {self.reader} reads up to {self.version}: "
                f"upgrade this {self.reader}"
            )
