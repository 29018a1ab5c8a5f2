"""Measures how fast this machine reads its memory, which limits how fast one stream is generated."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

_BYTES: Final = 64 * 2**20  # for each thread: more than the processors' caches hold
_ROUNDS: Final = 3  # the best counts, because noise only lengthens one


def bytes_per_second() -> float:
    """Of all cores that the process may use together. Takes about a tenth of a second."""
    threads = len(os.sched_getaffinity(0))
    blocks = [np.ones(_BYTES // 8) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            list(pool.map(np.sum, blocks))  # numpy releases the interpreter's lock
            best = min(best, time.perf_counter() - began)
    return threads * _BYTES / best
