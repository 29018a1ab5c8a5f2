"""A conversation's affinity: lets a gateway send its turns to one worker, which has the beginning in its cache.

Rules:
- It is a keyed digest of how the conversation begins: everything up to its first message by the user. Its turns and branches
  have that in common, so a client keeps no state, and one value says no more than "the same as before".
- Its key is the salt of the prefix cache. So it changes with the salt, and where workers may share nothing it says nothing.
- It holds pool and model too: a conversation in two pools has two values.
- It is only outside the seal, and only for chats: other requests have no later turn.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any, Final

from lacre.jose.jws import b64u
from lacre.wire.outer import AFFINITY_SIZE

_LABEL: Final = b"lacre affinity"
_FIRST: Final = ("instructions", "system")  # instructions before the messages, of the Responses API and of the Messages API
_TURNS: Final = ("messages", "input")


def beginning_of(body: Mapping[str, Any]) -> bytes | None:
    """How the conversation of a chat's body begins, the same for each of its turns; None if no message is by a user."""
    turns = next((body[name] for name in _TURNS if name in body), None)
    if isinstance(turns, list):
        number = next((n for n, turn in enumerate(turns, 1) if isinstance(turn, dict) and turn.get("role") == "user"), 0)
        turns = turns[:number]
    elif isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        return None
    first = [body.get(name) for name in _FIRST]
    return json.dumps([first, turns], sort_keys=True, separators=(",", ":")).encode()


def affinity_of(salt: str, pool: str, model: str, beginning: bytes) -> str:
    """The value of the header: base64url. salt: of the prefix cache, as it is sealed."""
    said = b"\x00".join((_LABEL, pool.encode(), model.encode(), beginning))
    return b64u(hmac.new(salt.encode(), said, hashlib.sha256).digest()[:AFFINITY_SIZE])
