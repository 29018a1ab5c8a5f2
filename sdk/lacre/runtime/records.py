"""Records that are frozen for the type checker, and cheap to make.

A frozen dataclass assigns each field through `object.__setattr__`, at four times the cost of a plain assignment. For each
request a gateway makes some thirty records with two hundred fields.

Rules:
- To mypy, `@record(frozen=True, slots=True)` is the dataclass of these words, and it refuses every assignment to a field.
- At run time nothing prevents an assignment. So it is for records that a server makes for each request. What programs get from
  the SDK stays a frozen dataclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    from dataclasses import dataclass

    def record(*, frozen, slots, kw_only=False):
        """As a frozen dataclass with slots: equal by its fields, and hashable."""
        if not (frozen and slots):
            raise TypeError("a record is frozen and has slots")
        return dataclass(slots=True, unsafe_hash=True, kw_only=kw_only)


__all__ = ["record"]
