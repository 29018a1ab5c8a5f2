"""The outer header fields of a sealed request: everything that a gateway's policy and budgets may know of it (docs/wire.md).

The client writes them, the gateway parses them, and the worker compares them with their copies inside the seal.
"""

from __future__ import annotations

import re
from typing import Final

POOL: Final = "lacre-pool"
MODEL: Final = "lacre-model"
ACTION: Final = "lacre-action"
CEILING: Final = "lacre-max-tokens"
# `YES` if the caller named no ceiling: then `CEILING` is the client's default, which the gateway may lower.
CEILING_IS_DEFAULT: Final = "lacre-max-tokens-default"
YES, NO = "?1", "?0"  # Booleans of RFC 9651
MOST: Final = "lacre-most-tokens"  # only inside the seal: the default ceiling, above which nothing may be granted
SHAPE: Final = "lacre-shape"
# Only outside the seal: equal for the requests of one conversation. No worker needs it, because it knows the salt.
AFFINITY: Final = "lacre-affinity"
AFFINITY_SIZE: Final = 16  # bytes; base64url in the header

MAX_TOKENS: Final = 2**31 - 1  # the largest ceiling: what an engine can count
# Of an explained prompt: each is one more run of it, so this bounds what a gateway reserves.
MAX_PARTS: Final = 16
# Of an answer under a lens: each layer of each token costs as much as a token of a prompt.
MAX_LENS_TOKENS: Final = 32
MAX_LENS_LAYERS: Final = 16
_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")  # visible ASCII
AFFINITY_FORM: Final = r"[A-Za-z0-9_-]{21}[AQgw]"  # of that size, in its one spelling
_AFFINITY: Final = re.compile(AFFINITY_FORM)
_COUNT: Final = re.compile(r"[1-9][0-9]{0,9}")


def is_name(text: str) -> bool:
    """Of a pool or a model. Whether there is one of that name is for the manifest to say."""
    return _NAME.fullmatch(text) is not None


def is_affinity(text: str) -> bool:
    return _AFFINITY.fullmatch(text) is not None


def ceiling_in(text: str) -> int | None:
    """None where the text is no ceiling of output tokens."""
    return int(text) if _COUNT.fullmatch(text) and int(text) <= MAX_TOKENS else None
