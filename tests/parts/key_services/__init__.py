"""Key management services on this machine, for one contract: real ones where there are, and what stands in for the others.

`openbao` and `softhsm` are the real thing; `moto` has AWS's requests and answers, not all of its rules; `google` and `azure`
are servers of ours that answer as those two document it, and really encrypt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Key:
    """address: for `lacre_fabric.keys.kms`. name: what the stand calls it."""

    address: str
    name: str


class Stand(Protocol):
    """A running service. environment: what a process that uses it needs. secrets: what must show nowhere.

    absent: the address of a key where no service is; "" where there is no such thing.
    revokes: whether the stand keeps to a revocation as the service does.
    """

    environment: Mapping[str, str]
    secrets: tuple[str, ...]
    absent: str
    revokes: bool

    def key(self) -> Key:
        """A new one."""

    def revoke(self, key: Key) -> None:
        """From now on the service opens nothing that the key wrapped before."""

    def close(self) -> None: ...
