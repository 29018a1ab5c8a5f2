"""The clients that applications use: `httpx2` clients whose every request is sealed, with chat in a word."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from types import EllipsisType, NoneType
from typing import Any, Final

import httpx2

from lacre._version import __version__
from lacre.chat.choices import StreamEvent
from lacre.chat.reply import CHAT_PATH, Reply, check
from lacre.chat.request import ChatRequest, Messages
from lacre.chat.stream import Deltas, events_of
from lacre.chat.stream_async import AsyncChatStream
from lacre.chat.stream_sync import ChatStream
from lacre.errors import SettingsError, UsageError
from lacre.evidence.exchange_info import documented
from lacre.evidence.verification import Verification
from lacre.exchange.call import DEFAULT_KEMS, ORIGIN, Sealing
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.runtime.forks import StaysInProcess
from lacre.transport import oauth, request_log
from lacre.transport.dial import DEFAULT_LIMITS, Dial, NoCookies, async_outer, outer
from lacre.transport.oauth import AsyncToken, Token
from lacre.transport.options import Verify
from lacre.transport.sealed import FACTS
from lacre.transport.sealed_async import AsyncSealedTransport
from lacre.transport.sealed_sync import SealedTransport
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import Memory, VersionFile
from lacre.wire.header import Kem
from lacre.wire.padding import Shape

BASE_URL: Final = f"{ORIGIN}/v1"

# Reading waits for the queue (30 s) and a long prompt's prefill; the other steps are quick.
DEFAULT_TIMEOUT: Final = httpx2.Timeout(10.0, read=120.0, write=60.0, pool=120.0)

# A gateway may restart twice while a long answer is on its way, and a connection be cut. What may be a worker's end counts
# apart, and is followed once (`lacre.exchange.retry`).
DEFAULT_RESUMES: Final = 3

EventHooks = Mapping[str, list[Any]]
Timeout = httpx2.Timeout | float | None | EllipsisType  # of one call; `...` is the client's own


class Client(StaysInProcess, httpx2.Client):
    """A sealed client. It *is* an `httpx2.Client` with its base URL set: `client.post("/v1/chat/completions", json=...)`.

    url: the connection string `lacre://host[:port]?trust=ROOT`; `LACRE_URL` if None.
    token: the access token, a callable that returns one, asked before each request, or OAuth2 `ClientCredentials`;
    `LACRE_TOKEN` if None. An empty one is refused: it never stands for the environment's.
    dpop: the key that the token is bound to, where it is (RFC 9449); the one in the file `LACRE_DPOP_KEY` if None.
    pool: the pool of workers to seal to. kem: the key encapsulation that is accepted, or several, the preferred first.
    shape: `pad` fills requests and answers up to lengths that say little, for which an answer that is no event stream comes in
    pieces of 16 KiB; `none` does not.
    keep_identifying_fields: seal `user`, `metadata`, `safety_identifier` and `prompt_cache_key` too, instead of dropping them.
    retries: how often a request is sent anew, sealed afresh, where nothing of an answer came, or the gateway asks to come back
    within 10 s; `attempts` counts. Without a number: twice, and for 30 s where it certainly did not run.
    resume: how often an answer that broke off is resumed at most; 0 for never. After two workers that may be lost by it, never.
    max_concurrency: how many requests may be on their way at once; the others wait for their turn. A stream counts until it was
    read to the end or left. None for no limit. An async client counts in each event loop.
    memory: where the newest manifest seen is remembered; a file under `$XDG_STATE_HOME` by default.
    verify, proxy, limits, transport: of the connection to the gateway, as in `httpx2.Client`.

    Every request may raise LacreError; a refusal by the gateway and an error from the worker are responses for
    `client.post` and exceptions for `chat` and `chat_stream`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: Token | None = None,
        dpop: ProofKey | None = None,
        pool: str = "default",
        kem: Kem | Sequence[Kem] = DEFAULT_KEMS,
        shape: Shape = "pad",
        keep_identifying_fields: bool = False,
        retries: int | None = None,
        resume: int = DEFAULT_RESUMES,
        max_concurrency: int | None = None,
        memory: Memory | None = None,
        timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
        verify: Verify = True,
        proxy: httpx2.Proxy | httpx2.URL | str | None = None,
        limits: httpx2.Limits = DEFAULT_LIMITS,
        transport: httpx2.BaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        where = ConnectionString.parse(arguments.setting(url, "url", "LACRE_URL"))
        bearer, key = oauth.source(token), _proof_key(dpop)
        sealing = Sealing(
            where.root,
            _memory(memory),
            pool=arguments.text(pool, "pool"),
            kems=arguments.one_or_more(kem, Kem, "kem"),
            shape=shape,
            keep_identifying_fields=arguments.flag(keep_identifying_fields, "keep_identifying_fields"),
            retries=None if retries is None else arguments.count(retries, "retries"),
            resume=arguments.count(resume, "resume"),
        )
        lasts, at_once, hooks = arguments.timeout(timeout), _at_once(max_concurrency), arguments.hooks(event_hooks)
        checks, through = arguments.verify(verify), arguments.proxy(proxy)
        arguments.instance(transport, (httpx2.BaseTransport, NoneType), "transport")
        dial: Dial[httpx2.BaseTransport] = Dial(
            where.base_url, _OUTER_HEADERS, DEFAULT_TIMEOUT, checks, through, arguments.limits(limits), transport
        )
        self._sealed = SealedTransport(sealing, outer(dial), bearer, key, at_once)
        self._pool_name = pool
        request_log.once("httpx2")
        super().__init__(transport=self._sealed, base_url=ORIGIN, timeout=lasts, event_hooks=hooks, cookies=NoCookies())

    def build_request(self, *args: Any, **options: Any) -> httpx2.Request:
        """As `httpx2.Client.build_request`. Raises UsageError for what no request can be built of."""
        with arguments.of_request():
            return super().build_request(*args, **options)

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - whatever is asked for
    ) -> httpx2.Response:
        """As `httpx2.Client.send`, but a redirect is an answer like any other: it is never followed."""
        arguments.sendable(request, httpx2.Request, httpx2.SyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx2.USE_CLIENT_DEFAULT, httpx2.Auth, httpx2.Request)
        return super().send(request, stream=stream, auth=auth, follow_redirects=False)

    def chat(
        self,
        messages: Messages,
        *,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> Reply:
        """One whole answer.

        messages: a string, or messages in OpenAI's form; params: any parameter of OpenAI's chat completions.
        timeout: of this call, in seconds. extra_body: further members of the body, as `openai` has it; so `extra_headers`, of
        which only what does not say who asks is sealed, and `extra_query`. Raises UsageError for what is wrong with these.
        """
        request = ChatRequest.of(
            messages,
            params,
            stream=False,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        return Reply.parse(self.post(CHAT_PATH, content=request.content, **request.options))

    def chat_stream(
        self,
        messages: Messages,
        *,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> ChatStream:
        """The answer as it comes: iterate for its text, over `events()` for all of it, or take `reply()`. As for `chat`.

        An answer that breaks off is resumed (`resume`). Iterating raises StreamBroken where it cannot be: the pieces until then
        are not the whole of it.
        """
        request = ChatRequest.of(
            messages,
            params,
            stream=True,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        deltas = Deltas()
        return ChatStream(self._events(request, deltas), deltas)

    def _events(self, request: ChatRequest, deltas: Deltas) -> Generator[StreamEvent, None, None]:
        with self.stream("POST", CHAT_PATH, content=request.content, **request.options) as response:
            facts = deltas.facts = response.extensions[FACTS]
            with documented(facts), events_of(response) as events:
                if response.is_error:
                    response.read()
                    check(response)
                for event in events:
                    yield from deltas.feed(event.data)
                deltas.close(facts)

    @property
    def verification(self) -> Verification:
        """What was checked, and with what, of the newest request; before the first one, what there is."""
        return self._sealed.verification

    def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        return _models(self._sealed.manifest().pools, self._pool_name)


class AsyncClient(StaysInProcess, httpx2.AsyncClient):
    """The async twin of `Client`; `token` may also be a callable that returns an awaitable."""

    def __init__(
        self,
        url: str | None = None,
        *,
        token: AsyncToken | None = None,
        dpop: ProofKey | None = None,
        pool: str = "default",
        kem: Kem | Sequence[Kem] = DEFAULT_KEMS,
        shape: Shape = "pad",
        keep_identifying_fields: bool = False,
        retries: int | None = None,
        resume: int = DEFAULT_RESUMES,
        max_concurrency: int | None = None,
        memory: Memory | None = None,
        timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
        verify: Verify = True,
        proxy: httpx2.Proxy | httpx2.URL | str | None = None,
        limits: httpx2.Limits = DEFAULT_LIMITS,
        transport: httpx2.AsyncBaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        where = ConnectionString.parse(arguments.setting(url, "url", "LACRE_URL"))
        bearer, key = oauth.async_source(token), _proof_key(dpop)
        sealing = Sealing(
            where.root,
            _memory(memory),
            pool=arguments.text(pool, "pool"),
            kems=arguments.one_or_more(kem, Kem, "kem"),
            shape=shape,
            keep_identifying_fields=arguments.flag(keep_identifying_fields, "keep_identifying_fields"),
            retries=None if retries is None else arguments.count(retries, "retries"),
            resume=arguments.count(resume, "resume"),
        )
        lasts, at_once, hooks = arguments.timeout(timeout), _at_once(max_concurrency), arguments.hooks(event_hooks)
        checks, through = arguments.verify(verify), arguments.proxy(proxy)
        arguments.instance(transport, (httpx2.AsyncBaseTransport, NoneType), "transport")
        dial: Dial[httpx2.AsyncBaseTransport] = Dial(
            where.base_url, _OUTER_HEADERS, DEFAULT_TIMEOUT, checks, through, arguments.limits(limits), transport
        )
        self._sealed = AsyncSealedTransport(sealing, async_outer(dial), bearer, key, at_once)
        self._pool_name = pool
        request_log.once("httpx2")
        super().__init__(transport=self._sealed, base_url=ORIGIN, timeout=lasts, event_hooks=hooks, cookies=NoCookies())

    def build_request(self, *args: Any, **options: Any) -> httpx2.Request:
        """As `httpx2.AsyncClient.build_request`. Raises UsageError for what no request can be built of."""
        with arguments.of_request():
            return super().build_request(*args, **options)

    async def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - whatever is asked for
    ) -> httpx2.Response:
        """As `httpx2.AsyncClient.send`, but a redirect is an answer like any other: it is never followed."""
        arguments.sendable(request, httpx2.Request, httpx2.AsyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx2.USE_CLIENT_DEFAULT, httpx2.Auth, httpx2.Request)
        return await super().send(request, stream=stream, auth=auth, follow_redirects=False)

    async def chat(
        self,
        messages: Messages,
        *,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> Reply:
        """As `Client.chat`."""
        request = ChatRequest.of(
            messages,
            params,
            stream=False,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        return Reply.parse(await self.post(CHAT_PATH, content=request.content, **request.options))

    def chat_stream(
        self,
        messages: Messages,
        *,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> AsyncChatStream:
        """The answer as it comes: iterate for its text, over `events()` for all of it, or take `reply()`. As for `chat`.

        An answer that breaks off is resumed (`resume`). Iterating raises StreamBroken where it cannot be: the pieces until then
        are not the whole of it.
        """
        request = ChatRequest.of(
            messages,
            params,
            stream=True,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        deltas = Deltas()
        return AsyncChatStream(self._events(request, deltas), deltas)

    async def _events(self, request: ChatRequest, deltas: Deltas) -> AsyncGenerator[StreamEvent, None]:
        async with self.stream("POST", CHAT_PATH, content=request.content, **request.options) as response:
            facts = deltas.facts = response.extensions[FACTS]
            with documented(facts), events_of(response) as events:
                if response.is_error:
                    await response.aread()
                    check(response)
                async for event in events:
                    for said in deltas.feed(event.data):
                        yield said
                deltas.close(facts)

    @property
    def verification(self) -> Verification:
        """As `Client.verification`."""
        return self._sealed.verification

    async def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        return _models((await self._sealed.manifest()).pools, self._pool_name)


_OUTER_HEADERS: Final = {"user-agent": f"lacre/{__version__}"}


def _memory(given: Memory | None) -> Memory:
    if given is None:
        return VersionFile.default()
    if isinstance(given, type) or not callable(getattr(given, "update", None)):
        raise UsageError("memory: lacre.VersionMemory(), a lacre.VersionFile or another with `update` is wanted")
    return given


def _at_once(given: int | None) -> int | None:
    return None if given is None else arguments.count(given, "max_concurrency", least=1)


def _proof_key(given: ProofKey | None) -> ProofKey | None:
    if given is None:
        path = os.environ.get("LACRE_DPOP_KEY")
        return ProofKey.load(path) if path else None
    if not isinstance(given, ProofKey):
        raise UsageError(f"dpop: a lacre.ProofKey is wanted, not {arguments.kind_of(given)}: lacre.ProofKey.load(path)")
    return given


def _models(pools: Mapping[str, Any], pool: str) -> tuple[str, ...]:
    if pool not in pools:
        raise SettingsError(f"the manifest has no pool {pool!r}: it has {', '.join(sorted(pools)) or 'none'}")
    models: tuple[str, ...] = pools[pool].models
    return models


def fetch_manifest(url: str | None = None, *, memory: Memory | None = None, verify: Verify = True) -> Manifest:
    """The manifest that the gateway serves, verified against the root pinned in `url` (`LACRE_URL`). Needs no token."""
    where = ConnectionString.parse(arguments.setting(url, "url", "LACRE_URL"))
    dial: Dial[httpx2.BaseTransport] = Dial(where.base_url, _OUTER_HEADERS, DEFAULT_TIMEOUT, arguments.verify(verify))
    with SealedTransport(Sealing(where.root, _memory(memory)), outer(dial), "") as sealed:
        return sealed.manifest()
