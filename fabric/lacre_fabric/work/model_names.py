"""A model's id, derived from the name of its file where nobody gave one: the same for `lacre up` and for a worker.

An id stands in URLs, in policies and on command lines. So it begins with a letter or digit, and each of its characters may
stand in a URL's path as it is.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Final

PATTERN: Final = r"^[\x21-\x7e]{1,128}$"  # what an id may be that somebody gave: printable ASCII without spaces
MAX_NAME: Final = 128  # characters
_OTHERS: Final = re.compile(r"[^a-z0-9._~+@:=-]+")
_SHARD: Final = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")  # what `llama-gguf-split` puts behind the name of each file of a model
_DIGEST: Final = 8  # hexadecimal digits


def is_name(name: str) -> bool:
    return re.fullmatch(PATTERN.strip("^$"), name) is not None


def from_file(path: Path) -> str:
    """`My Model (Q4).gguf` is `my-model-q4`, and so is each file that this model was split into. Part of a digest stands
    for letters that ASCII lacks, so that two such files have two ids. Other files can still share one: who serves several must
    compare.
    """
    stem = _SHARD.sub("", path.stem)
    plain = "".join(one for one in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(one))
    name = _OTHERS.sub("-", plain.lower()).strip("-._~+@:=")
    lost = any(one.isalnum() and not one.isascii() for one in plain)
    if not name or lost or len(name) > MAX_NAME:
        digest = hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
        name = f"{name[: MAX_NAME - _DIGEST - 1] or 'model'}-{digest}"
    return name
