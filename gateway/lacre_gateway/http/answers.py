"""How our apps answer errors: with a row of the fixed problem table, and nothing of the exception."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from lacre import problems
from lacre.errors import Detail
from lacre.problems import MEDIA_TYPE, Problem
from lacre_gateway.http.access_log import REFUSED
from lacre_gateway.http.refusal import Refusal

INVALID: Final = Problem(
    "urn:lacre:problem:invalid-arguments", 422, "The call's arguments do not fit the API's description",
    "See /openapi.json.")  # fmt: skip
BODY_TOO_LARGE: Final = Problem(
    "urn:lacre:problem:body-too-large", 413, "The call's body is too large", "Send at most 16 KiB.")  # fmt: skip
BODY_TOO_SLOW: Final = Problem(
    "urn:lacre:problem:body-too-slow", 408, "The call's body arrived too slowly", "Send it again.")  # fmt: skip
_BY_STATUS: Final = {400: INVALID, 404: problems.NOT_FOUND, 405: problems.METHOD_NOT_ALLOWED}
# For OpenAPI: the schema of a problem document, and a response with one.
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
    """For errors of the router, refusals, and all other exceptions."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(Exception, _failed)


def described(
    app: FastAPI, paths: Mapping[str, Any] | None = None, security: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The app's OpenAPI document, with the problem document in place of FastAPI's own error form.

    paths, security: paths that it cannot know, and the schemes that they name.
    """
    document = FastAPI.openapi(app)
    document["paths"].update(paths or {})
    components = document.setdefault("components", {})
    components.setdefault("securitySchemes", {}).update(security or {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = _SCHEMA
    return document


def problem_response(request: Request, refusal: Refusal) -> Response:
    """The answer, whose reason the access log gets."""
    state = request.scope.setdefault("state", {})
    state[REFUSED] = refusal.said()
    answer, body = refusal.answer(state.get("request_id"))
    headers = {name.decode(): value.decode() for name, value in answer}
    return Response(body, status_code=refusal.problem.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's answer to a wrong path or method, or to a body that is not JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    details: dict[str, Detail] = {}
    if status == problems.NOT_FOUND.status:
        details["paths"] = tuple(sorted(request.app.openapi()["paths"]))
    elif status == problems.METHOD_NOT_ALLOWED.status:
        details["methods"] = tuple(sorted(_allowed(request)))
    refusal = Refusal(_BY_STATUS.get(status, problems.INTERNAL), details=details)
    response = problem_response(request, refusal)
    if "methods" in details:
        response.headers["allow"] = ", ".join(sorted(_allowed(request)))
    return response


def _allowed(request: Request) -> set[str]:
    """Over all routes of the path: the router itself names only the first one's methods."""
    app: FastAPI = request.app
    path: str = request.scope["path"]  # a URL would use the caller's Host header
    described = app.openapi()["paths"].get(path, {})
    return {name.upper() for name in described} | {
        method
        for route in app.routes
        if getattr(route, "path", None) == path
        for method in getattr(route, "methods", None) or ()
    }


async def _refused(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal(problems.INTERNAL)
    return problem_response(request, refusal)


async def _failed(request: Request, _error: Exception) -> Response:
    """A fault of the gateway. The server logs the place; the caller learns only the request id to report."""
    response = problem_response(request, Refusal(problems.INTERNAL))
    if (request_id := request.scope.get("state", {}).get("request_id")) is not None:
        response.headers["lacre-request-id"] = request_id  # the layer that otherwise adds this header is bypassed
    return response
