"""httpx2 transports that seal: every request is sealed to a pool of workers, every answer opened as it arrives.

Rules:
- Only requests for `lacre.sealing.ORIGIN` are taken. Redirects are never followed, and what is not sealed is never returned
  as success.
- A refusal by the gateway (which nobody signed) becomes a 4xx or 5xx response in OpenAI's error shape, with words of our own
  and the typed error in `extensions["lacre.refusal"]`: programs that know OpenAI's errors handle it as theirs.
- httpx2's exceptions of the outer connection are mapped here and nowhere else.

The sync and the async transport drive the generators of `lacre.sealing`; every decision is made there.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx2

from lacre import audit, dpop, errors, problems
from lacre.dpop import ProofKey
from lacre.inner import Plain
from lacre.manifest import Manifest
from lacre.sealing import ORIGIN, Opening, Outer, Refusal, Sealing, Send, Steps, T
from lacre.verification import Verification

REFUSAL: Final = "lacre.refusal"
FACTS: Final = "lacre"
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1

Token = str | Callable[[], str]
AsyncToken = str | Callable[[], str | Awaitable[str]]


class Unreachable(errors.NetworkError, httpx2.NetworkError):
    """The gateway could not be reached, or the connection broke before its answer. Both Lacre's and httpx2's."""

    remedy = "Check the address in LACRE_URL, and that the gateway runs; then try again."


class TimedOut(errors.NetworkError, httpx2.TimeoutException):
    """The gateway did not connect or answer in time. Both Lacre's and httpx2's."""

    remedy = "Try again, or allow a longer `timeout=...`: a queue and a long prompt take their time."


class SealedTransport(httpx2.BaseTransport):
    """Seals requests and sends them through `outer`, a client whose base URL is the gateway. Closes it when closed."""

    def __init__(self, sealing: Sealing, outer: httpx2.Client, token: Token, key: ProofKey | None = None) -> None:
        self._sealing = sealing
        self._outer = outer
        self._token = token
        self._key = key

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        steps = self._sealing.exchange(plain_request(request, request.read()))
        answer, body = self._drive(steps, request.extensions)
        if isinstance(answer, Refusal):
            body.close()
            return refusal_response(answer)
        return sealed_response(answer, SealedStream(answer, body))

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    def manifest(self) -> Manifest:
        """The verified manifest, fetched where there is none or it grows old."""
        manifest, body = self._drive(self._sealing.manifest(), {})
        body.close()
        return manifest

    def close(self) -> None:
        self._outer.close()

    def _drive(self, steps: Steps[T], extensions: Any) -> tuple[T, _Body]:
        """Does what `steps` asks; returns its result and the last response's body, still open."""
        body = _Body(None)
        try:
            step = next(steps)
            while True:
                if isinstance(step, Send):
                    body.close()
                    token = self._access_token() if step.sealed else None
                    request = outer_request(self._outer, step, _credentials(self._outer, step, token, self._key), extensions)
                    with _mapped():
                        response = self._outer.send(request, stream=True, follow_redirects=False)
                    body = _Body(response)
                    step = steps.send(outer_of(response, token))
                else:
                    with _mapped():
                        data = body.read()
                    step = steps.send(data)
        except StopIteration as done:
            result: T = done.value
            return result, body
        except BaseException:
            body.close()
            raise

    def _access_token(self) -> str:
        return self._token if isinstance(self._token, str) else self._token()


class AsyncSealedTransport(httpx2.AsyncBaseTransport):
    """The async twin of `SealedTransport`; the token may be a callable that returns an awaitable."""

    def __init__(self, sealing: Sealing, outer: httpx2.AsyncClient, token: AsyncToken, key: ProofKey | None = None) -> None:
        self._sealing = sealing
        self._outer = outer
        self._token = token
        self._key = key

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        steps = self._sealing.exchange(plain_request(request, await request.aread()))
        answer, body = await self._drive(steps, request.extensions)
        if isinstance(answer, Refusal):
            await body.close()
            return refusal_response(answer)
        return sealed_response(answer, AsyncSealedStream(answer, body))

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    async def manifest(self) -> Manifest:
        """The verified manifest, fetched where there is none or it grows old."""
        manifest, body = await self._drive(self._sealing.manifest(), {})
        await body.close()
        return manifest

    async def aclose(self) -> None:
        await self._outer.aclose()

    async def _drive(self, steps: Steps[T], extensions: Any) -> tuple[T, _AsyncBody]:
        body = _AsyncBody(None)
        try:
            step = next(steps)
            while True:
                if isinstance(step, Send):
                    await body.close()
                    token = await self._access_token() if step.sealed else None
                    request = outer_request(self._outer, step, _credentials(self._outer, step, token, self._key), extensions)
                    with _mapped():
                        response = await self._outer.send(request, stream=True, follow_redirects=False)
                    body = _AsyncBody(response)
                    step = steps.send(outer_of(response, token))
                else:
                    with _mapped():
                        data = await body.read()
                    step = steps.send(data)
        except StopIteration as done:
            result: T = done.value
            return result, body
        except BaseException:
            await body.close()
            raise

    async def _access_token(self) -> str:
        token = self._token if isinstance(self._token, str) else self._token()
        return token if isinstance(token, str) else await token


class _Body:
    """The body of an outer response, read step by step; of none at first."""

    def __init__(self, response: httpx2.Response | None) -> None:
        self._response = response
        self._chunks = iter(()) if response is None else response.iter_raw()

    def read(self) -> bytes | None:
        return next(self._chunks, None)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class _AsyncBody:
    """The async twin of `_Body`."""

    def __init__(self, response: httpx2.Response | None) -> None:
        self._response = response
        self._chunks = None if response is None else response.aiter_raw()

    async def read(self) -> bytes | None:
        return None if self._chunks is None else await anext(self._chunks, None)

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()


class SealedStream(httpx2.SyncByteStream):
    """The body of a sealed answer, piece by piece as its records open."""

    def __init__(self, opening: Opening, body: _Body) -> None:
        self._opening = opening
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield from self._opening.take()
        while not self._opening.ended:
            with _mapped_stream():
                data = self._body.read()
            self._opening.feed(data)
            yield from self._opening.take()

    def close(self) -> None:
        self._body.close()


class AsyncSealedStream(httpx2.AsyncByteStream):
    """The async twin of `SealedStream`."""

    def __init__(self, opening: Opening, body: _AsyncBody) -> None:
        self._opening = opening
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._opening.take():
            yield piece
        while not self._opening.ended:
            with _mapped_stream():
                data = await self._body.read()
            self._opening.feed(data)
            for piece in self._opening.take():
                yield piece

    async def aclose(self) -> None:
        await self._body.close()


def plain_request(request: httpx2.Request, content: bytes) -> Plain:
    """The application's request, if it is for us. Raises DestinationError."""
    url = request.url
    if (url.scheme, url.host, url.port) != ("https", ORIGIN.removeprefix("https://"), None):
        raise errors.DestinationError(
            "a sealed client reaches its workers only: use lacre.BASE_URL, and another client for other addresses"
        )
    headers = [(name.lower(), value) for name, value in request.headers.multi_items()]
    return Plain(request.method, url.raw_path.decode("ascii"), headers, content)


def _credentials(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, token: str | None, key: ProofKey | None
) -> list[tuple[str, str]]:
    """The headers that say who asks: the token, and with a key the proof that it is ours (RFC 9449 section 7.1)."""
    if token is None:
        return []
    if key is None:
        return [("authorization", f"Bearer {_checked(token)}")]
    url = str(outer.base_url.join(step.path))
    proof = key.proof(step.method, url, token=_checked(token), request=step.sealed)
    return [("authorization", f"DPoP {token}"), (dpop.HEADER, proof)]


def outer_request(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, credentials: list[tuple[str, str]], extensions: Any
) -> httpx2.Request:
    """The request to the gateway, with the application's own timeouts."""
    headers = [*step.headers, ("accept-encoding", "identity"), *credentials]
    timeouts = {"timeout": extensions["timeout"]} if "timeout" in extensions else None
    request = outer.build_request(step.method, step.path, headers=headers, content=step.body or None, extensions=timeouts)
    # One that the gateway set would tie requests together that were made with different tokens.
    request.headers.pop("cookie", None)
    return request


def _checked(token: str) -> str:
    """The token, if it is of the form of one: what refuses it later on would say it aloud. Raises SettingsError."""
    if not _TOKEN.fullmatch(token):
        raise errors.SettingsError(
            "the access token holds a space, a line end or a sign that none has: see LACRE_TOKEN, or what token=... gives"
        )
    return token


def outer_of(response: httpx2.Response, token: str | None = None) -> Outer:
    """token: the one that was sent."""
    headers = response.headers
    return Outer(
        status=response.status_code,
        content_type=headers.get("content-type", ""),
        retry_after=_seconds(headers.get("retry-after")),
        audit=headers.get(audit.HEADER, ""),
        speaks_for={} if token is None else audit.speaks_for(token),
    )


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in its delta-seconds form, the one that our gateway sends (RFC 9110 section 10.2.3)."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() and len(retry_after) < 7 else None


def sealed_response(opening: Opening, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream) -> httpx2.Response:
    head = opening.head
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in head.headers]
    return httpx2.Response(head.status, headers=headers, stream=stream, extensions={FACTS: opening.facts})


def refusal_response(refusal: Refusal) -> httpx2.Response:
    problem, exception = refusal.problem, refusal.problem.exception(refusal.retry_after)
    exception.verification = refusal.facts.verification
    code = "model_not_found" if problem is problems.UNKNOWN_POOL else problem.slug
    error = {"message": f"{problem.title}. {problem.remedy}", "type": "lacre_gateway_refusal", "param": None, "code": code}
    headers = {"content-type": "application/json"}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(int(refusal.retry_after))
    return httpx2.Response(
        problem.status,
        headers=headers,
        content=json.dumps({"error": error}).encode(),
        extensions={REFUSAL: exception, FACTS: refusal.facts},
    )


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        raise TimedOut("the gateway did not answer in time: try again, or allow a longer timeout") from exc
    except httpx2.TransportError as exc:
        raise Unreachable("the gateway cannot be reached: check the address in LACRE_URL and that the gateway runs") from exc


@contextmanager
def _mapped_stream() -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        raise TimedOut("the answer stalled: what came so far is not the whole of it") from exc
    except httpx2.TransportError as exc:
        raise errors.TruncatedStream("the connection broke in mid-answer: what came so far is not the whole of it") from exc
