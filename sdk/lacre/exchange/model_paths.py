"""The model API's paths, and what is wrong with a path that is not one of them.

Only the client knows the path, because it is sealed: the gateway sees an action. The gateway says that the action `http` is not
allowed, and this file finds the path that was probably meant. Callers that may use other paths never reach this code.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

from lacre import problems
from lacre.errors import Details
from lacre.problems import Problem

# As `lacre.exchange.request.action_of` has them.
METHODS: Final[dict[str, str]] = {
    "/v1/chat/completions": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/rerank": "POST",
    "/v1/explain": "POST",
    "/v1/tokenize": "POST",
    "/v1/responses/input_tokens": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/models": "GET",
    "/infill": "POST",
}
_MODEL: Final = "/v1/models/"  # followed by a model's name
KNOWN: Final = tuple(METHODS)


def misdirected(method: str, path: str) -> tuple[Problem, Details]:
    """What to tell the caller about an unknown path, or about a known path with the wrong method. path: without its query."""
    plain = _plain(path)
    meant = plain if plain in METHODS else "/v1" + plain if "/v1" + plain in METHODS else None
    verb = method == "POST" and ":" in plain  # KServe's protocol: `/v1/models/NAME:predict`
    if plain.startswith(_MODEL) and not verb and (plain != path or method != "GET"):
        meant = plain
    if meant is None:
        return problems.UNKNOWN_PATH, {"paths": KNOWN}
    if meant != path:
        return problems.PATH_FORM, {"paths": (meant,)}
    return problems.WRONG_METHOD, {"paths": (meant,), "methods": (METHODS.get(meant, "GET"),)}


def _plain(path: str) -> str:
    """The path as it was probably meant: unescaped and in lower case, without empty segments, dots, or spaces at its ends."""
    segments = [segment for segment in unquote(path).strip().split("/") if segment not in ("", ".")]
    lowered = [segment.lower() for segment in segments[:2]] + segments[2:]
    whole = "/" + "/".join(lowered)
    return whole if whole.startswith(_MODEL) else whole.lower()
