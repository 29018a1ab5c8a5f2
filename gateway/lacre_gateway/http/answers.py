"""How an app of ours answers what goes wrong: a row of the fixed problem table, and nothing of the exception."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from lacre import problems
from lacre.errors import Detail
from lacre.problems import MEDIA_TYPE, Problem
from lacre_gateway.http.exchange import REFUSED
from lacre_gateway.http.refusal import Refusal

INVALID: Final = Problem(
    "urn:lacre:problem:invalid-arguments", 422, "The call's arguments are not of the form that the API describes",
    "See /openapi.json.")  # fmt: skip
BODY_TOO_LARGE: Final = Problem(
    "urn:lacre:problem:body-too-large", 413, "The call's body is too large", "Send at most 16 KiB.")  # fmt: skip
BODY_TOO_SLOW: Final = Problem(
    "urn:lacre:problem:body-too-slow", 408, "The call's body arrived too slowly", "Send it again.")  # fmt: skip
_BY_STATUS: Final = {400: INVALID, 404: problems.NOT_FOUND, 405: problems.METHOD_NOT_ALLOWED}
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


def described(
    app: FastAPI, paths: Mapping[str, Any] | None = None, security: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The app's OpenAPI document, with the problem document in place of FastAPI's own form.

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


def problem_response(refusal: Refusal) -> Response:
    headers = {name.decode(): value.decode() for name, value in refusal.headers()}
    return Response(refusal.body, status_code=refusal.problem.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says of a wrong path or method, or of a body that is no JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    details: dict[str, Detail] = {}
    if status == problems.NOT_FOUND.status:
        details["paths"] = tuple(sorted(request.app.openapi()["paths"]))
    elif status == problems.METHOD_NOT_ALLOWED.status:
        details["methods"] = tuple(sorted(_allowed(request)))
    refusal = Refusal(_BY_STATUS.get(status, problems.INTERNAL), details=details)
    request.scope["state"][REFUSED] = refusal
    response = problem_response(refusal)
    if "methods" in details:
        response.headers["allow"] = ", ".join(sorted(_allowed(request)))
    return response


def _allowed(request: Request) -> set[str]:
    """Of all routes of the path: the router itself names the first one's methods alone."""
    app: FastAPI = request.app
    path: str = request.scope["path"]  # a URL would be made with the Host that was sent
    described = app.openapi()["paths"].get(path, {})
    return {name.upper() for name in described} | {
        method
        for route in app.routes
        if getattr(route, "path", None) == path
        for method in getattr(route, "methods", None) or ()
    }


async def _refused(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal(problems.INTERNAL)
    request.scope["state"][REFUSED] = refusal
    return problem_response(refusal)


async def _failed(request: Request, _error: Exception) -> Response:
    """A fault of the gateway. The server logs where it was; the caller learns that it was, and by which id to ask for it."""
    response = problem_response(Refusal(problems.INTERNAL))
    if (request_id := request.scope.get("state", {}).get("request_id")) is not None:
        response.headers["lacre-request-id"] = request_id  # it is answered past the layer that says so elsewhere
    return response
