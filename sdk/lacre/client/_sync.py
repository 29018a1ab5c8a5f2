# Generated from _async.py by tools/unasync.py: do not edit.
"""The client that applications use: an `httpx2.Client` that seals every request, with methods for chat."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from types import EllipsisType, NoneType
from typing import Any, Unpack

import httpx2

from lacre.chat.attribution import EXPLAIN_PATH, Attribution, ExplainedPrompt, Parts
from lacre.chat.choices import StreamEvent
from lacre.chat.params import CallOptions, ChatParams, ExplainParams, Timeout
from lacre.chat.reply import CHAT_PATH, Reply, check
from lacre.chat.request import JSON_HEADERS, ChatRequest, Messages
from lacre.chat.stream import Deltas, events_of
from lacre.chat.stream_sync import ChatStream
from lacre.chat.structured import Schema
from lacre.chat.texts import (
    EMBED_PATH,
    RERANK_PATH,
    TOKENIZE_PATH,
    EmbedReply,
    RerankReply,
    TokenizeReply,
    embed_body,
    rerank_body,
    texts_of,
    tokenize_body,
)
from lacre.client.settings import (
    DEFAULT_RESUMES,
    DEFAULT_TIMEOUT,
    OUTER_HEADERS,
    EventHooks,
    at_once_of,
    memory_of,
    overrides_of,
    pin_models_of,
    proof_key_of,
)
from lacre.evidence.exchange_info import documented
from lacre.evidence.prices import Prices, prices_of
from lacre.evidence.verification import Verification
from lacre.exchange.call import DEFAULT_KEMS, Sealing
from lacre.exchange.own_usage import OwnUsage
from lacre.exchange.routing import models_of
from lacre.exchange.stream_state import StreamState, checked_key
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.transport import token_choice
from lacre.transport.dial import DEFAULT_LIMITS, Dial, Verify, outer
from lacre.transport.oauth import Token
from lacre.transport.sealed import ANSWER, BEGUN, FACTS
from lacre.transport.sealed_sync import SealedTransport
from lacre.transport.sealing_client_sync import SealingClient
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest_store import Memory
from lacre.wire.header import Kem
from lacre.wire.padding import Shape


class Client(SealingClient):
    """A sealed client. It *is* an `httpx2.Client` with its base URL set: `client.post("/v1/chat/completions",
    json=...)`.

    url: the connection string `lacre://host[:port]?trust=ROOT`; `LACRE_URL` if None. token: the access token, a callable that
    returns one for each request, or OAuth2 `ClientCredentials`; `LACRE_TOKEN` if None. An empty one is refused and never
    replaced by the environment's. Async clients accept async callables. dpop: the key that the token is bound to, if it is
    bound (RFC 9449); the one in the file `LACRE_DPOP_KEY` if None. pool: the pool of workers to seal to; None: as the manifest
    routes the model, or the pool `default`. kem: the accepted key encapsulation, or several, the preferred first. shape: `pad`
    pads requests and answers to lengths that reveal little; an answer that is not an event stream then arrives in pieces of 16
    KiB. `none` does not pad. keep_identifying_fields: also seal `user`, `metadata`, `safety_identifier` and `prompt_cache_key`,
    instead of dropping them. pin_models: the digest of a model's file, `sha256:…`, by the model's name: a manifest or receipt
    that names another raises WrongModel; if None, `LACRE_PIN_MODELS` has `NAME=sha256:…`, with commas between several. retries:
    how often to send a request again, freshly sealed, if none of its answer arrived, or if the gateway asks to come back within
    10 s; `attempts` counts them. Default: twice, and for 30 s if the request certainly did not run. resume: how often to resume
    an answer that broke off; 0: never. Never after two workers that the request may have ended. max_concurrency: how many
    requests may run at once; the others wait for their turn. A stream counts until it is read to the end or left. None: no
    limit. An async client counts in each event loop. cache_scope: names one of a server's users, whose prompts get a prefix
    cache of their own; no worker can tell who it is. affinity: let the gateway see which chats begin alike: the next turn of a
    conversation then comes to the worker that has it in its cache. prices: of models, like the table `prices` of a gateway's
    plans.toml; `reply.cost` is then known. memory: where to remember the newest manifest seen; default: a file under
    `$XDG_STATE_HOME`. verify, proxy, limits, transport: of the connection to the gateway, as in `httpx2.Client`.

    Every request may raise LacreError. A refusal by the gateway and an error from the worker are responses for `client.post`
    and exceptions for `chat`, `chat_stream` and `explain`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: Token | None = None,
        dpop: ProofKey | None = None,
        pool: str | None = None,
        kem: Kem | Sequence[Kem] = DEFAULT_KEMS,
        shape: Shape = "pad",
        keep_identifying_fields: bool = False,
        pin_models: Mapping[str, str] | None = None,
        retries: int | None = None,
        resume: int = DEFAULT_RESUMES,
        max_concurrency: int | None = None,
        cache_scope: str | None = None,
        affinity: bool = True,
        prices: Prices | None = None,
        memory: Memory | None = None,
        timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
        verify: Verify = True,
        proxy: httpx2.Proxy | httpx2.URL | str | None = None,
        limits: httpx2.Limits = DEFAULT_LIMITS,
        transport: httpx2.BaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        where = ConnectionString.parse(arguments.setting(url, "url", "LACRE_URL"))
        bearer, key = token_choice.source(token, where.root), proof_key_of(dpop)
        sealing = Sealing(
            where.root,
            memory_of(memory),
            pool=None if pool is None else arguments.text(pool, "pool"),
            kems=arguments.one_or_more(kem, Kem, "kem"),
            shape=shape,
            keep_identifying_fields=arguments.flag(keep_identifying_fields, "keep_identifying_fields"),
            pin_models=pin_models_of(pin_models),
            retries=None if retries is None else arguments.count(retries, "retries"),
            resume=arguments.count(resume, "resume"),
            affinity=arguments.flag(affinity, "affinity"),
            prices=prices_of(prices),
        )
        lasts, at_once, hooks = arguments.timeout(timeout), at_once_of(max_concurrency), arguments.hooks(event_hooks)
        checks, through = arguments.verify(verify), arguments.proxy(proxy)
        arguments.instance(transport, (httpx2.BaseTransport, NoneType), "transport")
        dial: Dial[httpx2.BaseTransport] = Dial(
            where.base_url, OUTER_HEADERS, DEFAULT_TIMEOUT, checks, through, arguments.limits(limits), transport
        )
        overrides = overrides_of(cache_scope=cache_scope)
        self._sealed = SealedTransport(sealing, outer(dial), bearer, key, at_once, overrides=overrides)
        self._pool_name = pool
        super().__init__(self._sealed, lasts, hooks)

    def with_options(
        self,
        *,
        timeout: Timeout = ...,
        retries: int | EllipsisType | None = ...,
        model: str | None = None,
        pool: str | None = None,
        cache_scope: str | None = None,
    ) -> Client:
        """A client with other options that shares this one's connections, manifest, token and `max_concurrency`.

        model: of requests that name none. `...` and None: as before, except that `timeout=None` sets no limit and
        `retries=None` retries as a new client does. It costs microseconds: make one for each user or request. Close only the
        first client. Event hooks are shared.
        """
        overrides = overrides_of(retries=retries, model=model, pool=pool, cache_scope=cache_scope)
        other = Client.__new__(Client)
        other._sealed, other._pool_name = self._sealed.overridden(overrides), pool or self._pool_name
        lasts = self.timeout if isinstance(timeout, EllipsisType) else arguments.timeout(timeout)
        SealingClient.__init__(other, other._sealed, lasts, self.event_hooks)
        return other

    def chat(
        self,
        messages: Messages,
        *,
        schema: Schema | None = None,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[ChatParams],
    ) -> Reply:
        """One whole answer.

        messages: a string, or messages in OpenAI's form; params: any parameter of OpenAI's chat completions. schema: what the
        answer must fit, a JSON schema or a type that pydantic reads; `reply.parsed()` returns the instance. timeout: of
        this call, in seconds. extra_body, extra_query, extra_headers: as in `openai`; headers that say who asks are not sealed.
        Raises UsageError for a wrong argument.
        """
        request = ChatRequest.of(
            messages,
            params,
            stream=False,
            schema=schema,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        return Reply.parse(self.post(CHAT_PATH, content=request.content, **request.options), schema)

    def chat_stream(
        self,
        messages: Messages,
        *,
        schema: Schema | None = None,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[ChatParams],
    ) -> ChatStream:
        """The answer as it arrives: iterate for its text, over `events()` for all of it, or call `reply()`. Arguments: see
        `chat`.

        An answer that breaks off is resumed (`resume`). If it cannot be, iterating raises StreamBroken: the pieces so far are
        not the whole answer.
        """
        request = ChatRequest.of(
            messages,
            params,
            stream=True,
            schema=schema,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        deltas = Deltas(schema)
        return ChatStream(self._events(request, deltas), deltas)

    def continue_stream(self, state: str, *, key: bytes, timeout: Timeout = ...) -> ChatStream:
        """An answer that another process or device of this user began: its text so far, as one piece, and then the rest.

        state: what `stream.state(key)` returned there. The answer runs twice if the other one goes on reading, and both are
        paid for; `usage` is that of this request. Raises UsageError and Expired.
        """
        begun = StreamState.open(state, checked_key(key), self._sealed.root, time.time())
        asked = {} if isinstance(timeout, EllipsisType) else {"timeout": arguments.timeout(timeout)}
        request = ChatRequest(begun.content, {"headers": dict(JSON_HEADERS), "extensions": {BEGUN: begun}, **asked})
        deltas = Deltas()
        return ChatStream(self._events(request, deltas, begun), deltas)

    def _events(self, request: ChatRequest, deltas: Deltas, begun: StreamState | None = None) -> Generator[StreamEvent]:
        with self.stream("POST", CHAT_PATH, content=request.content, **request.options) as response:
            facts = deltas.facts = response.extensions[FACTS]
            deltas.received = response.extensions.get(ANSWER)
            with documented(facts), events_of(response) as events:
                if response.is_error:
                    response.read()
                    check(response)
                for said in () if begun is None else deltas.feed(begun.begun):
                    yield said
                for event in events:
                    for said in deltas.feed(event.data):
                        yield said
                deltas.close(facts)

    def explain(
        self,
        messages: Messages,
        *,
        parts: Parts = (),
        answer: str | None = None,
        lens: bool = False,
        timeout: Timeout = ...,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **params: Unpack[ExplainParams],
    ) -> Attribution:
        """Which parts of the prompt an answer rests on, and how surprising each of its tokens was. Needs the scope
        `lacre:explain`.

        messages: a question, or messages in OpenAI's form; a content part with an `id` is a part. parts: further parts, such as
        documents, by id or as a list; they go before the text of the last message. answer: the answer to explain; None: the
        model answers first, greedily, with at most `max_tokens`. lens: also what the model would say after each layer, for the
        answer's first tokens; it needs the scope `lacre:explain:lens` too. Other arguments: see `chat`.
        """
        prompt = ExplainedPrompt.of(messages, parts)
        own: dict[str, Any] = ({} if answer is None else {"answer": answer}) | ({"lens": True} if lens else {})
        request = ChatRequest.of(
            prompt.turns,
            own | dict(params),
            stream=False,
            timeout=timeout,
            extra_headers=extra_headers,
            extra_query=extra_query,
            extra_body=extra_body,
        )
        response = self.post(EXPLAIN_PATH, content=request.content, **request.options)
        return Attribution.parse(response, prompt.texts, lens=lens)

    def embed(
        self,
        texts: str | Iterable[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        **options: Unpack[CallOptions],
    ) -> EmbedReply:
        """The vectors of texts. Needs the scope `lacre:embed`.

        dimensions: of each vector, for models that can shorten theirs. options: see `chat`.
        """
        listed = texts_of(texts, "texts")
        request = ChatRequest.about(embed_body(listed, model, dimensions), options)
        return EmbedReply.parse(self.post(EMBED_PATH, content=request.content, **request.options), len(listed))

    def tokenize(self, prompt: Messages, *, model: str | None = None, **options: Unpack[CallOptions]) -> TokenizeReply:
        """The tokens of a prompt, before it costs anything: of a string as it stands, of messages in the form of the model's
        template. Needs the scope `lacre:inspect`. options: see `chat`.
        """
        request = ChatRequest.about(tokenize_body(prompt, model), options)
        return TokenizeReply.parse(self.post(TOKENIZE_PATH, content=request.content, **request.options))

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
        **options: Unpack[CallOptions],
    ) -> RerankReply:
        """Documents by their relevance to a query. Needs the scope `lacre:rerank`, and a pool with a model that ranks.

        top_n: how many to return; None: all. options: see `chat`.
        """
        listed = texts_of(documents, "documents")
        request = ChatRequest.about(rerank_body(query, listed, model, top_n), options)
        response = self.post(RERANK_PATH, content=request.content, **request.options)
        return RerankReply.parse(response, listed, top_n)

    @property
    def verification(self) -> Verification:
        """Every check of the newest request, with its keys; before the first request, the checks so far."""
        return self._sealed.verification

    def models(self) -> tuple[str, ...]:
        """The models that a request may name, the default first: those of the pool, and the routes of the verified manifest."""
        return models_of(self._sealed.manifest(), self._pool_name)

    def usage(self) -> OwnUsage:
        """What you and your tenant have used of each limit. The gateway says so, and nobody signs it. Raises LacreError."""
        return self._sealed.usage()
