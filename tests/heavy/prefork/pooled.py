"""A pool of `multiprocessing` that is forked after the clients were used. As a program: python pooled.py CALLS WORKERS."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

import service


def call(number: int) -> list[str]:
    """One call: the process that made it, and what came of it."""
    return [str(os.getpid()), service.answer(number)]


if __name__ == "__main__":
    calls, workers = int(sys.argv[1]), int(sys.argv[2])
    own = call(0)
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=20) as pool:
        told = pool.map(call, range(calls), chunksize=1)
    print(json.dumps([own, *told, call(0)]))
