"""Text for a POSIX shell: each value is one word, with any characters."""

from __future__ import annotations

import shlex


def exported(name: str, value: str) -> str:
    """The line that sets an environment variable. The value is always in quotes."""
    return f"export {name}={quoted(value)}"


def quoted(value: str) -> str:
    word = shlex.quote(value)
    return f"'{word}'" if word == value else word
