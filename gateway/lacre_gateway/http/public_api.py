"""The public routes as an OpenAPI document. It is not served: clients follow docs/wire.md, and tests compare the routes with
it.
"""

from __future__ import annotations

from typing import Any, Final

from lacre.wire import outer
from lacre.wire.header import MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE
from lacre_gateway.http.answers import PROBLEM
from lacre_gateway.http.headers import Action, Shape


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_OPTIONAL: Final = (outer.CEILING_IS_DEFAULT, outer.AFFINITY)


def _header(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": name not in _OPTIONAL, "schema": schema}


_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "number"}
_READY: Final = _object(
    ("status", "missing", "away", "queues_lost", "rules", "manifest", "manifests_ignored"),
    status={"enum": ["ready", "not ready"]},
    missing={"type": "object", "additionalProperties": _TEXT},
    away={"type": "array", "items": _TEXT},
    queues_lost={"type": "array", "items": _TEXT},
    rules={"type": "object"},
    manifest={"anyOf": [_object(("version", "expires_at"), version={"type": "integer"}, expires_at=_NUMBER), {"type": "null"}]},
    manifests_ignored={"type": "integer"},
)
_NAME: Final = {"type": "string", "pattern": "^[!-~]{1,128}$"}
_MAYBE: Final = {"anyOf": [_NUMBER, {"type": "null"}]}
_LIMIT: Final = _object(
    ("limit", "scope", "unit", "ceiling", "used", "remaining", "resets_at"),
    limit=_TEXT,
    scope={"enum": ["user", "tenant-on-plan", "tenant"]},
    unit=_TEXT,
    ceiling={"type": "integer"},
    used={"type": "integer"},
    remaining={"type": "integer"},
    resets_at=_MAYBE,
)
_USAGE: Final = _object(("plan", "currency", "limits"), plan=_TEXT, currency=_TEXT, limits={"type": "array", "items": _LIMIT})
# The refusals of a sealed request: the rows of `lacre.problems`.
_REFUSALS: Final = ("400", "401", "403", "404", "408", "409", "413", "415", "422", "429", "502", "503")

PATHS: Final[dict[str, Any]] = {
    "/v1/sealed": {
        "post": {
            "operationId": "sealed",
            "summary": "A sealed request, answered by a sealed response (docs/wire.md).",
            "security": [{"token": []}],
            "parameters": [
                _header(outer.POOL, **_NAME),
                _header(outer.MODEL, **_NAME),
                _header(outer.ACTION, enum=[action.value for action in Action]),
                _header(outer.CEILING, type="integer", minimum=1, maximum=outer.MAX_TOKENS),
                _header(outer.CEILING_IS_DEFAULT, enum=[outer.YES, outer.NO]),
                _header(outer.SHAPE, enum=[shape.value for shape in Shape]),
                _header(outer.AFFINITY, type="string", pattern=f"^{outer.AFFINITY_FORM}$"),
            ],
            "requestBody": {
                "required": True,
                "content": {MEDIA_TYPE_REQUEST: {"schema": {"type": "string", "format": "binary"}}},
            },
            "responses": {
                "200": {"description": "The answer, record by record.", "content": {MEDIA_TYPE_RESPONSE: {}}},
                **dict.fromkeys(_REFUSALS, PROBLEM),
            },
        }
    },
    "/v1/manifest": {
        "get": {
            "operationId": "manifest",
            "summary": "The signed manifest and the chain of root statements.",
            "responses": {
                "200": _json("As it was published.", {"type": "object"}),
                "304": {"description": "It is the one that If-None-Match names."},
                "503": PROBLEM,
            },
        }
    },
    "/v1/me/usage": {
        "get": {
            "operationId": "ownUsage",
            "summary": "What the caller has used of its own limits and its tenant's. Money in micro-units.",
            "security": [{"token": []}],
            "responses": {
                "200": _json("Each limit of the caller.", _USAGE),
                **dict.fromkeys(("401", "403", "429", "503"), PROBLEM),
            },
        }
    },
    "/healthz": {
        "get": {
            "operationId": "healthz",
            "summary": "Whether the process runs.",
            "responses": {"200": _json("It does.", _object(("status",), status={"const": "ok"}))},
        }
    },
    "/readyz": {
        "get": {
            "operationId": "readyz",
            "summary": "Whether requests can be served now, and if not, what is missing.",
            "responses": {"200": _json("They can.", _READY), "503": _json("They cannot.", _READY)},
        }
    },
}  # fmt: skip
SECURITY: Final = {"token": {"type": "http", "scheme": "bearer"}}
