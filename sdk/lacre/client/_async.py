"""The client that applications use: an `httpx2.AsyncClient` whose every request is sealed, with chat in a word."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import NoneType
from typing import Any

import httpx2

from lacre.chat.choices import StreamEvent
from lacre.chat.reply import CHAT_PATH, Reply, check
from lacre.chat.request import ChatRequest, Messages
from lacre.chat.stream import Deltas, events_of
from lacre.chat.stream_async import AsyncChatStream
from lacre.client.settings import (
    DEFAULT_RESUMES,
    DEFAULT_TIMEOUT,
    OUTER_HEADERS,
    EventHooks,
    Timeout,
    at_once_of,
    memory_of,
    models_of,
    proof_key_of,
)
from lacre.evidence.exchange_info import documented
from lacre.evidence.verification import Verification
from lacre.exchange.call import DEFAULT_KEMS, Sealing
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.transport import oauth
from lacre.transport.dial import DEFAULT_LIMITS, Dial, Verify, async_outer
from lacre.transport.oauth import AsyncToken
from lacre.transport.sealed import FACTS
from lacre.transport.sealed_async import AsyncSealedTransport
from lacre.transport.sealing_client_async import AsyncSealingClient
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest_store import Memory
from lacre.wire.header import Kem
from lacre.wire.padding import Shape


class AsyncClient(AsyncSealingClient):
    """A sealed client. It *is* an `httpx2.AsyncClient` with its base URL set:
    `await client.post("/v1/chat/completions", json=...)`.

    url: the connection string `lacre://host[:port]?trust=ROOT`; `LACRE_URL` if None.
    token: the access token, a callable that returns one, asked before each request, or OAuth2 `ClientCredentials`;
    `LACRE_TOKEN` if None. An empty one is refused: it never stands for the environment's. Async clients take async callables.
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
    verify, proxy, limits, transport: of the connection to the gateway, as in `httpx2.AsyncClient`.

    Every request may raise LacreError; a refusal by the gateway and an error from the worker are responses for
    `client.post` and exceptions for `chat` and `chat_stream`.
    """

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
        bearer, key = oauth.async_source(token), proof_key_of(dpop)
        sealing = Sealing(
            where.root,
            memory_of(memory),
            pool=arguments.text(pool, "pool"),
            kems=arguments.one_or_more(kem, Kem, "kem"),
            shape=shape,
            keep_identifying_fields=arguments.flag(keep_identifying_fields, "keep_identifying_fields"),
            retries=None if retries is None else arguments.count(retries, "retries"),
            resume=arguments.count(resume, "resume"),
        )
        lasts, at_once, hooks = arguments.timeout(timeout), at_once_of(max_concurrency), arguments.hooks(event_hooks)
        checks, through = arguments.verify(verify), arguments.proxy(proxy)
        arguments.instance(transport, (httpx2.AsyncBaseTransport, NoneType), "transport")
        dial: Dial[httpx2.AsyncBaseTransport] = Dial(
            where.base_url, OUTER_HEADERS, DEFAULT_TIMEOUT, checks, through, arguments.limits(limits), transport
        )
        self._sealed = AsyncSealedTransport(sealing, async_outer(dial), bearer, key, at_once)
        self._pool_name = pool
        super().__init__(self._sealed, lasts, hooks)

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

    async def _events(self, request: ChatRequest, deltas: Deltas) -> AsyncGenerator[StreamEvent]:
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
        """What was checked, and with what, of the newest request; before the first one, what there is."""
        return self._sealed.verification

    async def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        manifest = await self._sealed.manifest()
        return models_of(manifest.pools, self._pool_name)
