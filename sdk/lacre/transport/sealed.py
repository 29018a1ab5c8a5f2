"""The inputs and outputs of the sealing transports: the application's request, a sealed answer, a refusal.

Rules:
- Only requests for `lacre.exchange.call.ORIGIN` are accepted.
- A refusal by the gateway becomes a 4xx or 5xx response in the error shape of the request's API. So its programs handle it.
  Nobody signed the refusal, so its words are ours; `extensions["lacre.refusal"]` has the typed error.
"""

from __future__ import annotations

import json
from typing import Final

import httpx2

from lacre import errors, problems
from lacre.exchange import retry
from lacre.exchange.call import ORIGIN
from lacre.exchange.refusal_shapes import shaped
from lacre.exchange.request import Overrides, Plain
from lacre.exchange.resume import ResumableAnswer
from lacre.exchange.sealed_answer import GatewayRefusal
from lacre.transport.mapped_errors import TimedOut, Unreachable

__all__ = ["FACTS", "REFUSAL", "TimedOut", "Unreachable", "plain_request", "refusal_response", "sealed_response"]

REFUSAL: Final = "lacre.refusal"
FACTS: Final = "lacre"
ANSWER: Final = "lacre.answer"  # of a response's extensions: the `ResumableAnswer`
BEGUN: Final = "lacre.begun"  # of a request's extensions: the `StreamState` to continue
# OpenAI's and Anthropic's packages look for the id there. It is the gateway's, because a worker does not know it.
REQUEST_IDS: Final = ("x-request-id", "request-id")


def plain_request(request: httpx2.Request, content: bytes, overrides: Overrides) -> Plain:
    """The application's request, if it is for us. Raises DestinationError."""
    url = request.url
    if (url.scheme, url.host, url.port) != ("https", ORIGIN.removeprefix("https://"), None):
        raise errors.DestinationError(
            "a sealed client reaches only its workers: use lacre.BASE_URL, and another client for other addresses"
        )
    headers = [(name.lower(), value) for name, value in request.headers.multi_items()]
    return Plain(request.method, url.raw_path.decode("ascii"), headers, content, overrides)


def sealed_response(answer: ResumableAnswer, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream) -> httpx2.Response:
    head = answer.head
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in head.headers if name not in REQUEST_IDS]
    if (request_id := answer.facts.request_id) is not None:
        headers += [(name.encode(), request_id.encode()) for name in REQUEST_IDS]
    return httpx2.Response(head.status, headers=headers, stream=stream, extensions={FACTS: answer.facts, ANSWER: answer})


def refusal_response(refusal: GatewayRefusal, path: str) -> httpx2.Response:
    """path: of the request, whose API has its own error objects."""
    problem, exception = refusal.problem, refusal.exception()
    refusal.facts.tell(exception)
    code = "model_not_found" if problem is problems.UNKNOWN_POOL else problem.slug
    error = {"message": f"{exception} {exception.remedy}", "type": "lacre_gateway_refusal", "param": None, "code": code}
    headers = {"content-type": "application/json"}
    if refusal.facts.request_id is not None:
        headers |= dict.fromkeys(REQUEST_IDS, refusal.facts.request_id)
    if problem in retry.LOST:
        headers["x-should-retry"] = "false"  # OpenAI's header for its clients: this request has cost as many workers as it may
    if refusal.retry_after is not None:
        headers["retry-after"] = str(int(refusal.retry_after))
    if isinstance(methods := refusal.details.get("methods"), tuple):
        headers["allow"] = ", ".join(methods)  # RFC 9110 section 15.5.6
    return httpx2.Response(
        problem.status,
        headers=headers,
        content=json.dumps(shaped(path, problem.status, error)).encode(),
        extensions={REFUSAL: exception, FACTS: refusal.facts},
    )
