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
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import httpx2

from lacre import audit, backoff, dpop, errors, problems
from lacre.credentials import MAX_ANSWER, AsyncToken, ClientCredentials, Issued, Token, checked
from lacre.dpop import ProofKey
from lacre.inner import Plain
from lacre.manifest import Manifest
from lacre.resume import Answer, asking
from lacre.sealing import ORIGIN, Refusal, Sealing
from lacre.steps import Done, Offload, Outer, Read, Send, Step, Steps, T, Wait
from lacre.verification import Verification

if TYPE_CHECKING:
    import anyio

REFUSAL: Final = "lacre.refusal"
FACTS: Final = "lacre"


class Unreachable(errors.NetworkError, httpx2.NetworkError):
    """The gateway could not be reached, or the connection broke before its answer. Both Lacre's and httpx2's."""

    remedy = "Check the address in LACRE_URL, and that the gateway runs; then try again."


class TimedOut(errors.NetworkError, httpx2.TimeoutException):
    """The gateway did not connect or answer in time. Both Lacre's and httpx2's."""

    remedy = "Try again, or allow a longer `timeout=...`: a queue and a long prompt take their time."
    timed_out = True


class SealedTransport(httpx2.BaseTransport):
    """Seals requests and sends them through `outer`, a client whose base URL is the gateway. Closes it when closed."""

    def __init__(self, sealing: Sealing, outer: httpx2.Client, token: Token, key: ProofKey | None = None) -> None:
        self._sealing = sealing
        self._outer = outer
        self._bearer = Bearer(token, outer, key)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        plain = plain_request(request, request.read())
        plain = asking(plain) if self._sealing.resume else plain
        outcome, wire = self.drive(self._sealing.exchange(plain), request.extensions)
        if isinstance(outcome, Refusal):
            wire.close()
            return refusal_response(outcome)
        answer = Answer(self._sealing, plain, outcome)
        return sealed_response(answer, SealedStream(self, answer, wire, request.extensions))

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    def manifest(self) -> Manifest:
        """The verified manifest, fetched where there is none or it grows old."""
        manifest, wire = self.drive(self._sealing.manifest(), {})
        wire.close()
        return manifest

    def close(self) -> None:
        self._outer.close()

    def drive(self, steps: Steps[T], extensions: Any) -> tuple[T, Wire]:
        """Does what `steps` asks; returns its result, and the wire with the last response's body, still open."""
        wire = Wire(self._outer, self._bearer, extensions)
        try:
            step = next(steps)
            while True:
                try:
                    done = wire.do(step)
                except errors.LacreError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(done)
        except StopIteration as finished:
            result: T = finished.value
            return result, wire
        except BaseException:
            wire.close()
            raise


class AsyncSealedTransport(httpx2.AsyncBaseTransport):
    """The async twin of `SealedTransport`; the token may be a callable that returns an awaitable."""

    def __init__(self, sealing: Sealing, outer: httpx2.AsyncClient, token: AsyncToken, key: ProofKey | None = None) -> None:
        self._sealing = sealing
        self._outer = outer
        self._bearer = AsyncBearer(token, outer, key)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        plain = plain_request(request, await request.aread())
        plain = asking(plain) if self._sealing.resume else plain
        outcome, wire = await self.drive(self._sealing.exchange(plain), request.extensions)
        if isinstance(outcome, Refusal):
            await wire.close()
            return refusal_response(outcome)
        answer = Answer(self._sealing, plain, outcome)
        return sealed_response(answer, AsyncSealedStream(self, answer, wire, request.extensions))

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    async def manifest(self) -> Manifest:
        """The verified manifest, fetched where there is none or it grows old."""
        manifest, wire = await self.drive(self._sealing.manifest(), {})
        await wire.close()
        return manifest

    async def aclose(self) -> None:
        await self._outer.aclose()

    async def drive(self, steps: Steps[T], extensions: Any) -> tuple[T, AsyncWire]:
        wire = AsyncWire(self._outer, self._bearer, extensions)
        try:
            step = next(steps)
            while True:
                try:
                    done = await wire.do(step)
                except errors.LacreError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(done)
        except StopIteration as finished:
            result: T = finished.value
            return result, wire
        except BaseException:
            await wire.close()
            raise


class Wire:
    """Does the steps of one exchange; holds the last response, whose body is read step by step."""

    def __init__(self, outer: httpx2.Client, bearer: Bearer, extensions: Any) -> None:
        self._outer = outer
        self._bearer = bearer
        self._extensions = extensions
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def do(self, step: Step) -> Done:
        if isinstance(step, Send):
            return self._send(step)
        if isinstance(step, Read):
            with _mapped():
                return self.read()
        if isinstance(step, Wait):
            self.close()
            time.sleep(step.seconds)
            return None
        if isinstance(step, Offload):
            step.do()
            return None
        self._token, refused = self._bearer.token(self._token), self._token
        return self._token != refused

    def _send(self, step: Send) -> Outer:
        self.close()
        token = self._bearer.token() if step.sealed else None
        request = outer_request(self._outer, step, credentials(self._outer, step, token, self._bearer.key), self._extensions)
        with _mapped():
            self._response = self._outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.iter_raw()
        return outer_of(self._response, token)

    def read(self) -> bytes | None:
        return next(self._chunks, None)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class AsyncWire:
    """The async twin of `Wire`."""

    def __init__(self, outer: httpx2.AsyncClient, bearer: AsyncBearer, extensions: Any) -> None:
        self._outer = outer
        self._bearer = bearer
        self._extensions = extensions
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def do(self, step: Step) -> Done:
        if isinstance(step, Send):
            return await self._send(step)
        if isinstance(step, Read):
            with _mapped():
                return await self.read()
        if isinstance(step, Wait):
            await self.close()
            await _sleep(step.seconds)
            return None
        if isinstance(step, Offload):
            await _in_thread(step.do)
            return None
        self._token, refused = await self._bearer.token(self._token), self._token
        return self._token != refused

    async def _send(self, step: Send) -> Outer:
        await self.close()
        token = await self._bearer.token() if step.sealed else None
        request = outer_request(self._outer, step, credentials(self._outer, step, token, self._bearer.key), self._extensions)
        with _mapped():
            self._response = await self._outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.aiter_raw()
        return outer_of(self._response, token)

    async def read(self) -> bytes | None:
        return None if self._chunks is None else await anext(self._chunks, None)

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()


class Bearer:
    """The access token of each request. OAuth2's is asked for through `outer`, with its CA, proxy and timeouts, and bound to
    the key where there is one.
    """  # fmt: skip

    def __init__(self, source: Token, outer: httpx2.Client, key: ProofKey | None) -> None:
        """key: what the token is bound to, where it is."""
        self.key = key
        self._source = source
        self._outer = outer
        self._issued: Issued | None = None
        self._turn = threading.Lock()

    def token(self, refused: str | None = None) -> str:
        """refused: one that the gateway does not take, to get another; the same again where there is none."""
        source = self._source
        if isinstance(source, str):
            return source
        if not isinstance(source, ClientCredentials):
            return source()
        with self._turn:
            if self._issued is None or not self._issued.fresh(refused):
                self._issued = self._ask(source)
            return self._issued.token

    def _ask(self, source: ClientCredentials) -> Issued:
        began = time.monotonic()
        response, content = self._answer(source, None)
        if self.key is not None and (nonce := wanted_nonce(response, content)) is not None:
            response, content = self._answer(source, nonce)
        return Issued.parse(response.status_code, content, began)

    def _answer(self, source: ClientCredentials, nonce: str | None) -> tuple[httpx2.Response, bytes]:
        request = token_request(self._outer, source, self.key, nonce)
        with _mapped("the token server", "token_url"):
            response = self._outer.send(request, stream=True, follow_redirects=False)
            try:
                content = b""
                for piece in response.iter_raw():
                    content += piece
                    if len(content) > MAX_ANSWER:
                        break
            finally:
                response.close()
        return response, content


class AsyncBearer:
    """The async twin of `Bearer`."""

    def __init__(self, source: AsyncToken, outer: httpx2.AsyncClient, key: ProofKey | None) -> None:
        self.key = key
        self._source = source
        self._outer = outer
        self._issued: Issued | None = None
        self._turn: anyio.Lock | None = None

    async def token(self, refused: str | None = None) -> str:
        source = self._source
        if isinstance(source, str):
            return source
        if not isinstance(source, ClientCredentials):
            given = source()
            return given if isinstance(given, str) else await given
        async with self._lock():
            if self._issued is None or not self._issued.fresh(refused):
                self._issued = await self._ask(source)
            return self._issued.token

    def _lock(self) -> anyio.Lock:
        if self._turn is None:
            from anyio import Lock  # noqa: PLC0415 - what `import lacre` need not wait for

            self._turn = Lock()
        return self._turn

    async def _ask(self, source: ClientCredentials) -> Issued:
        began = time.monotonic()
        response, content = await self._answer(source, None)
        if self.key is not None and (nonce := wanted_nonce(response, content)) is not None:
            response, content = await self._answer(source, nonce)
        return Issued.parse(response.status_code, content, began)

    async def _answer(self, source: ClientCredentials, nonce: str | None) -> tuple[httpx2.Response, bytes]:
        request = token_request(self._outer, source, self.key, nonce)
        with _mapped("the token server", "token_url"):
            response = await self._outer.send(request, stream=True, follow_redirects=False)
            try:
                content = b""
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_ANSWER:
                        break
            finally:
                await response.aclose()
        return response, content


async def _in_thread(work: Callable[[], None]) -> None:
    from anyio import to_thread  # noqa: PLC0415 - what `import lacre` need not wait for

    await to_thread.run_sync(work)


async def _sleep(seconds: float) -> None:
    from anyio import sleep  # noqa: PLC0415 - what `import lacre` need not wait for

    await sleep(seconds)


class SealedStream(httpx2.SyncByteStream):
    """The body of a sealed answer, piece by piece as its records open; where it breaks off, it is resumed."""

    def __init__(self, transport: SealedTransport, answer: Answer, wire: Wire, extensions: Any) -> None:
        self._transport = transport
        self._answer = answer
        self._wire = wire
        self._extensions = extensions

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.take()
        while not self._answer.ended:
            try:
                with _mapped_stream():
                    data = self._wire.read()
                self._answer.feed(data)
            except errors.LacreError as broken:
                self._wire.close()
                _, self._wire = self._transport.drive(self._answer.resume(broken), self._extensions)
            yield from self._answer.take()

    def close(self) -> None:
        self._wire.close()


class AsyncSealedStream(httpx2.AsyncByteStream):
    """The async twin of `SealedStream`."""

    def __init__(self, transport: AsyncSealedTransport, answer: Answer, wire: AsyncWire, extensions: Any) -> None:
        self._transport = transport
        self._answer = answer
        self._wire = wire
        self._extensions = extensions

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._answer.take():
            yield piece
        while not self._answer.ended:
            try:
                with _mapped_stream():
                    data = await self._wire.read()
                self._answer.feed(data)
            except errors.LacreError as broken:
                await self._wire.close()
                _, self._wire = await self._transport.drive(self._answer.resume(broken), self._extensions)
            for piece in self._answer.take():
                yield piece

    async def aclose(self) -> None:
        await self._wire.close()


def plain_request(request: httpx2.Request, content: bytes) -> Plain:
    """The application's request, if it is for us. Raises DestinationError."""
    url = request.url
    if (url.scheme, url.host, url.port) != ("https", ORIGIN.removeprefix("https://"), None):
        raise errors.DestinationError(
            "a sealed client reaches its workers only: use lacre.BASE_URL, and another client for other addresses"
        )
    headers = [(name.lower(), value) for name, value in request.headers.multi_items()]
    return Plain(request.method, url.raw_path.decode("ascii"), headers, content)


def credentials(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, token: str | None, key: ProofKey | None
) -> list[tuple[str, str]]:
    """The headers that say who asks: the token, and with a key the proof that it is ours (RFC 9449 section 7.1)."""
    if token is None:
        return []
    if key is None:
        return [("authorization", f"Bearer {checked(token)}")]
    url = str(outer.base_url.join(step.path))
    proof = key.proof(step.method, url, token=checked(token), request=step.sealed)
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


def token_request(
    outer: httpx2.Client | httpx2.AsyncClient, source: ClientCredentials, key: ProofKey | None, nonce: str | None
) -> httpx2.Request:
    """key: what the token is to be bound to (RFC 9449 section 5). nonce: what the server asks a proof to have."""
    proof = {} if key is None else {dpop.HEADER: key.proof("POST", source.token_url, nonce=nonce)}
    return outer.build_request("POST", source.token_url, headers={**source.headers(), **proof}, content=source.form())


def wanted_nonce(response: httpx2.Response, content: bytes) -> str | None:
    """What a server asks for that takes no proof without a nonce of its own (RFC 9449 section 8)."""
    return response.headers.get("dpop-nonce") if response.status_code == 400 and b'"use_dpop_nonce"' in content else None


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


def sealed_response(answer: Answer, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream) -> httpx2.Response:
    head = answer.head
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in head.headers]
    return httpx2.Response(head.status, headers=headers, stream=stream, extensions={FACTS: answer.facts})


def refusal_response(refusal: Refusal) -> httpx2.Response:
    problem, exception = refusal.problem, refusal.problem.exception(refusal.retry_after)
    exception.verification = refusal.facts.verification
    code = "model_not_found" if problem is problems.UNKNOWN_POOL else problem.slug
    error = {"message": f"{problem.title}. {problem.remedy}", "type": "lacre_gateway_refusal", "param": None, "code": code}
    headers = {"content-type": "application/json"}
    if problem in backoff.LOST:
        headers["x-should-retry"] = "false"  # OpenAI's word to its clients: this one has cost as many workers as it may
    if refusal.retry_after is not None:
        headers["retry-after"] = str(int(refusal.retry_after))
    return httpx2.Response(
        problem.status,
        headers=headers,
        content=json.dumps({"error": error}).encode(),
        extensions={REFUSAL: exception, FACTS: refusal.facts},
    )


@contextmanager
def _mapped(who: str = "the gateway", setting: str = "LACRE_URL") -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        late = TimedOut(f"{who} did not answer in time: try again, or allow a longer timeout")
        late.reached = not isinstance(exc, httpx2.ConnectTimeout | httpx2.PoolTimeout)
        raise late from exc
    except httpx2.TransportError as exc:
        gone = Unreachable(f"{who} cannot be reached: check the address in {setting} and that it runs")
        gone.reached = not isinstance(exc, httpx2.ConnectError | httpx2.ProxyError | httpx2.UnsupportedProtocol)
        raise gone from exc


@contextmanager
def _mapped_stream() -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        raise TimedOut("the answer stalled: what came so far is not the whole of it") from exc
    except httpx2.TransportError as exc:
        broke = errors.TruncatedStream("the connection broke in mid-answer: what came so far is not the whole of it")
        broke.cut = True
        raise broke from exc
