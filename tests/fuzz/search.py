"""One target under the fuzzer, in a process of its own: `python -m fuzz.search TARGET [libFuzzer options and folders]`."""

from __future__ import annotations

import sys
from typing import Final

import atheris

# Coverage guides the search, so whatever parses is imported through this; cryptography and json are C and Rust.
SCHEMA: Final = "lacre_backend.api.schema"
PARSERS: Final = [
    "lacre",
    "lacre_fabric",
    "lacre_backend.node.grant_check",
    f"{SCHEMA}.grammar",
    f"{SCHEMA}.cases",
    "jwt",
    "lacre_backend.api.faces",
    "lacre_backend.api.media",
    "lacre_backend.api.messages",
]
with atheris.instrument_imports(include=PARSERS):
    from fuzz.targets import TARGETS

# Tracing memory is slow, so one input of so many is; the corpus's own are all traced in `test_corpus.py`.
TRACED: Final = 16


def main() -> None:
    target = TARGETS[sys.argv[1]]
    runs = 0

    def run(data: bytes) -> None:
        nonlocal runs
        runs += 1
        (target.check if runs % TRACED else target.check_memory)(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
