"""The model API's paths, and what is wrong with one that is none of them.

Only this side knows the path: it stands inside the seal, and the gateway sees an action. So the gateway says that the action
`http` is not allowed, and here is found which path was probably meant. Whoever may use other paths never comes here.
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
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/rerank": "POST",
    "/v1/tokenize": "POST",
    "/v1/models": "GET",
}
_MODEL: Final = "/v1/models/"  # and a model's name
KNOWN: Final = tuple(METHODS)


def misdirected(method: str, path: str) -> tuple[Problem, Details]:
    """What to tell the caller of a path that the model API has not, or of its method. path: without its query."""
    plain = _plain(path)
    meant = plain if plain in METHODS else "/v1" + plain if "/v1" + plain in METHODS else None
    verb = method == "POST" and ":" in plain  # as KServe's protocol has it: `/v1/models/NAME:predict`
    if plain.startswith(_MODEL) and not verb and (plain != path or method != "GET"):
        meant = plain
    if meant is None:
        return problems.UNKNOWN_PATH, {"paths": KNOWN}
    if meant != path:
        return problems.PATH_FORM, {"paths": (meant,)}
    return problems.WRONG_METHOD, {"paths": (meant,), "methods": (METHODS.get(meant, "GET"),)}


def _plain(path: str) -> str:
    """As its writer may have meant it: unescaped, without empty segments, dots, or spaces at its ends, and in small letters."""
    segments = [segment for segment in unquote(path).strip().split("/") if segment not in ("", ".")]
    lowered = [segment.lower() for segment in segments[:2]] + segments[2:]
    whole = "/" + "/".join(lowered)
    return whole if whole.startswith(_MODEL) else whole.lower()
