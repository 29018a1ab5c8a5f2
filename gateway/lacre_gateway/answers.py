"""How an app of ours answers what goes wrong: a row of the fixed problem table, and nothing of the exception."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from lacre import problems
from lacre.problems import MEDIA_TYPE
from lacre_gateway.refusal import Refusal

_BY_STATUS: Final = {404: problems.NOT_FOUND, 405: problems.METHOD_NOT_ALLOWED}
# For OpenAPI: what a problem document is, and a response that is one.
PROBLEM: Final = {
    "description": "A problem document (RFC 9457).",
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
_SCHEMA: Final = {
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {"type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"}},
}


def answer_with_problems(app: FastAPI) -> None:
    """For errors of the router, refusals, and whatever else comes."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(Exception, _failed)


def described(app: FastAPI, paths: dict[str, Any] | None = None) -> dict[str, Any]:
    """The app's OpenAPI document, with the problem document in place of FastAPI's own form. paths: those it cannot know."""
    document = FastAPI.openapi(app)
    document["paths"].update(paths or {})
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = _SCHEMA
    return document


def problem_response(refusal: Refusal) -> Response:
    headers = {name.decode(): value.decode() for name, value in refusal.headers()}
    return Response(refusal.problem.body(), status_code=refusal.problem.status, headers=headers)


async def _http_error(_request: Request, error: Exception) -> Response:
    """What the router says of a wrong path or method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    response = problem_response(Refusal(_BY_STATUS.get(status, problems.INTERNAL)))
    if isinstance(error, HTTPException) and "Allow" in (error.headers or {}):
        response.headers["allow"] = (error.headers or {})["Allow"]
    return response


async def _refused(_request: Request, error: Exception) -> Response:
    return problem_response(error if isinstance(error, Refusal) else Refusal(problems.INTERNAL))


async def _failed(_request: Request, _error: Exception) -> Response:
    """A fault of the gateway. The server logs where it was; the caller learns that it was."""
    return problem_response(Refusal(problems.INTERNAL))
