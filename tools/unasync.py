"""Writes the SDK's sync twins: each `*_sync.py` below `sdk/lacre` from the `*_async.py` beside it. `make generate` runs it.

Rules:
- The async file is written by hand, and the sync one is never edited. A test compares each with what this writes.
- Words are replaced, and nothing else: the same in code, docstrings, messages and comments.
- What needs more than another word (locks, sleeping, tasks against threads) is written by hand for both, in a module that both
  import: `lacre.transport.backend`, `concurrency`, `single_flight` and `lacre.runtime.forks`.

The package `unasync` (0.6) serves less well: it leaves docstrings, messages and comments as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

SDK: Final = Path(__file__).resolve().parent.parent / "sdk/lacre"
HEAD: Final = "# Generated from {} by tools/unasync.py: do not edit.\n"

# A whole word of an async file, and what the sync one says.
WORDS: Final = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "StopAsyncIteration": "StopIteration",
    "anext": "next",
    # of httpx2 and httpx
    "AsyncByteStream": "SyncByteStream",
    "aclose": "close",
    "aiter_raw": "iter_raw",
    "aread": "read",
    "handle_async_request": "handle_request",
    # ours
    "PerLoop": "PerProcess",
    "agiven": "given",
    "ag_running": "gi_running",
    "awatch": "watch",
    "CANCEL_TASK": "LEAVE_TO_THREAD",
    "task": "thread",
}
_WORD: Final = re.compile(r"\basync (?=(?:def|for|with)\b)|\bawait |[A-Za-z_]\w*")


def sync_word(word: str) -> str:
    """A word of an async file as the sync one has it: by `WORDS`, or by the way that our names are made."""
    if word in WORDS:
        return WORDS[word]
    if word in ("async ", "await "):
        return ""
    if re.match("_?Async[A-Z]", word):
        return word.replace("Async", "", 1)
    return re.sub("_async$", "_sync", word.removeprefix("async_"))


def sync_text(text: str, source: str) -> str:
    """The sync twin of an async file's text, not yet formatted. source: the file's name."""
    return HEAD.format(source) + _WORD.sub(lambda found: sync_word(found[0]), text)


def formatted(text: str, path: Path) -> str:
    """As `ruff` has it: names can be shorter or in another order now. path: where it will be."""
    # UP028: a loop that only yields. Its fix is unsafe for generators that are sent values, which none of ours is.
    fix = ("check", "--fix", "--unsafe-fixes", "--select", "I,UP028", "--exit-zero")
    for command in (fix, ("format",)):
        called = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(path), "-"]
        text = subprocess.run(called, input=text, check=True, capture_output=True, text=True, cwd=SDK).stdout
    return text


def twin(path: Path) -> Path:
    """The sync file of an async one."""
    return path.with_name(f"{path.stem.removesuffix('_async')}_sync.py")


def generated(path: Path) -> str:
    """The text of an async file's twin."""
    return formatted(sync_text(path.read_text(), path.name), twin(path))


def main() -> None:
    for path in sorted(SDK.rglob("*_async.py")):
        twin(path).write_text(generated(path))


if __name__ == "__main__":
    main()
