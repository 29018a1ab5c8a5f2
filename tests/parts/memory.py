"""What a process's memory holds, looked at from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def found_in_memory(pid: int, needles: Mapping[str, bytes]) -> set[str]:
    """The names of those that any readable memory of the process holds."""
    found = set()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, *_ = line.split()
            if "r" not in permissions or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            start, end = (int(number, 16) for number in span.split("-"))
            try:
                memory.seek(start)
                content = memory.read(end - start)
            except (OSError, ValueError, OverflowError):
                continue
            found |= {name for name, needle in needles.items() if needle in content}
    return found


def parts_of(stored: bytes) -> dict[str, bytes]:
    """A stored pool key's secret, and what X-Wing stretches it to: the seed of ML-KEM in halves, and the X25519 key."""
    secret = stored[15:47]
    seed = hashlib.shake_256(secret).digest(96)
    return {"secret": secret, "d": seed[:32], "z": seed[32:64], "x25519": seed[64:]}
