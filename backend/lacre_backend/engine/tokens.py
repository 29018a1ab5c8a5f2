"""The tokens of one task, and the length of the prefix that two tasks have in common.

Rules:
- Finding the common prefix costs almost the same for 128,000 tokens as for a few. It compares digests of prefixes, not tokens,
  so the cost grows with the logarithm.
- The digests are computed when the tokens arrive, on the caller's thread. The decode thread adds one for every `BLOCK` tokens.
- Equal digests mean equal tokens (SHA-256), so a cache is never reused for another text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final

BLOCK: Final = 64  # tokens per digest: few enough to compare the rest one by one, and 128,000 tokens need 2,000 digests


class Tokens:
    """The prompt, the answer so far, and the generated tokens. chained: whether prefixes will be compared."""

    __slots__ = ("_digests", "_hash", "all", "prompt")

    def __init__(self, prompt: Sequence[int], begun: Sequence[int] = (), *, chained: bool = True) -> None:
        self.all = array("q", prompt)  # not a list: the garbage collector would scan each of 128,000 entries
        self.all.extend(begun)
        self.prompt = len(prompt)
        self._hash = hashlib.sha256()
        self._digests: list[bytes] | None = None
        if chained:
            self._digests = []
            self._chain()

    def __len__(self) -> int:
        return len(self.all)

    def append(self, token: int) -> None:
        self.all.append(token)
        if self._digests is not None and len(self.all) % BLOCK == 0:
            self._chain()

    def common(self, other: Tokens, limit: int) -> int:
        """How many of the first `limit` tokens are the same in both. limit: at most the length of either."""
        if self._digests is None or other._digests is None:
            return 0
        ours, theirs = self._digests, other._digests
        whole = limit // BLOCK
        if whole and ours[whole - 1] != theirs[whole - 1]:
            same = 0  # this many blocks are the same; block `whole` is known to differ
            while whole - same > 1:
                middle = (same + whole) // 2
                same, whole = (middle, whole) if ours[middle - 1] == theirs[middle - 1] else (same, middle)
            whole = same
        start = whole * BLOCK
        rest, other_rest = self.all[start : min(limit, start + BLOCK)], other.all[start : min(limit, start + BLOCK)]
        if rest == other_rest:
            return start + len(rest)
        return start + next(i for i, token in enumerate(rest) if token != other_rest[i])

    def digests(self, length: int) -> tuple[bytes, ...]:
        """Of each whole block of the first `length` tokens; none if they were not chained."""
        return () if self._digests is None else tuple(self._digests[: length // BLOCK])

    def _chain(self) -> None:
        """Adds the missing digests. Each covers everything up to the end of its block."""
        if self._digests is not None:
            for start in range(len(self._digests) * BLOCK, len(self.all) - BLOCK + 1, BLOCK):
                self._hash.update(self.all[start : start + BLOCK].tobytes())
                self._digests.append(self._hash.copy().digest())


NO_TOKENS: Final = Tokens((), chained=False)
