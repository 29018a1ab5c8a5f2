"""The clients that applications use: `httpx2` clients whose every request is sealed, with chat in a word."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Final

import httpx2

from lacre._version import __version__
from lacre.credentials import AsyncToken, Token
from lacre.dpop import ProofKey
from lacre.errors import SettingsError
from lacre.manifest import Manifest
from lacre.memory import Memory, VersionFile
from lacre.padding import Shape
from lacre.reply import CHAT_PATH, Messages, Reply, chat_body, check
from lacre.sealing import DEFAULT_KEMS, ORIGIN, Sealing
from lacre.streams import AsyncChatStream, ChatStream, Deltas, events_of
from lacre.transport import FACTS, AsyncSealedTransport, SealedTransport
from lacre.trust import ConnectionString
from lacre.verification import Verification
from lacre.wire.header import Kem

BASE_URL: Final = f"{ORIGIN}/v1"

# Reading waits for the queue (30 s) and a long prompt's prefill; the other steps are quick.
DEFAULT_TIMEOUT: Final = httpx2.Timeout(10.0, read=120.0, write=60.0, pool=120.0)
DEFAULT_LIMITS: Final = httpx2.Limits(max_connections=100, max_keepalive_connections=20)  # httpx2's own

# A gateway may restart twice while a long answer is on its way, and a connection be cut. What may be a worker's end counts
# apart, and is followed once (`lacre.backoff`).
DEFAULT_RESUMES: Final = 3

Verify = ssl.SSLContext | str | bool
EventHooks = Mapping[str, list[Any]]


class Client(httpx2.Client):
    """A sealed client. It *is* an `httpx2.Client` with its base URL set: `client.post("/v1/chat/completions", json=...)`.

    url: the connection string `lacre://host[:port]?trust=ROOT`; `LACRE_URL` where left out.
    token: the access token, a callable that returns one, asked before each request, or OAuth2 `ClientCredentials`;
    `LACRE_TOKEN` where left out.
    dpop: the key that the token is bound to, where it is (RFC 9449); the one in the file `LACRE_DPOP_KEY` where left out.
    pool: the pool of workers to seal to. kem: the key encapsulation that is accepted, or several, the preferred first.
    shape: `pad` fills requests and answers up to lengths that say little, for which an answer that is no event stream comes in
    pieces of 16 KiB; `none` does not.
    keep_identifying_fields: seal `user`, `metadata`, `safety_identifier` and `prompt_cache_key` too, instead of dropping them.
    retries: how often a request is sent anew, sealed afresh, where nothing of an answer came, or the gateway asks to come back
    within 10 s; `attempts` counts. Without a number: twice, and for 30 s where it certainly did not run.
    resume: how often an answer that broke off is resumed at most; 0 for never. After two workers that may be lost by it, never.
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
        memory: Memory | None = None,
        timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
        verify: Verify = True,
        proxy: httpx2.Proxy | httpx2.URL | str | None = None,
        limits: httpx2.Limits = DEFAULT_LIMITS,
        transport: httpx2.BaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        where = ConnectionString.parse(url or _setting("LACRE_URL", "url"))
        outer = httpx2.Client(
            base_url=where.base_url,
            headers=_OUTER_HEADERS,
            timeout=DEFAULT_TIMEOUT,
            verify=verify,
            proxy=proxy,
            limits=limits,
            transport=transport,
        )
        sealing = Sealing(
            where.root,
            memory or VersionFile.default(),
            pool=pool,
            kems=_kems(kem),
            shape=shape,
            keep_identifying_fields=keep_identifying_fields,
            retries=retries,
            resume=resume,
        )
        self._sealed = SealedTransport(sealing, outer, token or _setting("LACRE_TOKEN", "token"), dpop or _proof_key())
        self._pool_name = pool
        super().__init__(transport=self._sealed, base_url=ORIGIN, timeout=timeout, event_hooks=event_hooks)

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - whatever is asked for
    ) -> httpx2.Response:
        """As `httpx2.Client.send`, but a redirect is an answer like any other: it is never followed."""
        return super().send(request, stream=stream, auth=auth, follow_redirects=False)

    def chat(self, messages: Messages, **params: Any) -> Reply:
        """One answer. messages: a string, or OpenAI-style messages; params: any OpenAI sampling parameter."""
        return Reply.parse(self.post(CHAT_PATH, json=chat_body(messages, params, stream=False)))

    def chat_stream(self, messages: Messages, **params: Any) -> ChatStream:
        """The answer's text, piece by piece as each record opens; once it has ended, its usage and receipt too.

        An answer that breaks off is resumed (`resume`). Iterating raises StreamBroken where it cannot be: the pieces until then
        are not the whole of it.
        """
        deltas = Deltas()
        return ChatStream(self._pieces(chat_body(messages, params, stream=True), deltas), deltas)

    def _pieces(self, body: Mapping[str, Any], deltas: Deltas) -> Generator[str, None, None]:
        with self.stream("POST", CHAT_PATH, json=body) as response:
            if response.is_error:
                response.read()
                check(response)
            deltas.facts = response.extensions[FACTS]
            with events_of(response) as events:
                for event in events:
                    if text := deltas.feed(event.data):
                        yield text
            deltas.close(deltas.facts)

    @property
    def verification(self) -> Verification:
        """What was checked, and with what, of the newest request; before the first one, what there is."""
        return self._sealed.verification

    def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        return _models(self._sealed.manifest().pools, self._pool_name)


class AsyncClient(httpx2.AsyncClient):
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
        memory: Memory | None = None,
        timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
        verify: Verify = True,
        proxy: httpx2.Proxy | httpx2.URL | str | None = None,
        limits: httpx2.Limits = DEFAULT_LIMITS,
        transport: httpx2.AsyncBaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        where = ConnectionString.parse(url or _setting("LACRE_URL", "url"))
        outer = httpx2.AsyncClient(
            base_url=where.base_url,
            headers=_OUTER_HEADERS,
            timeout=DEFAULT_TIMEOUT,
            verify=verify,
            proxy=proxy,
            limits=limits,
            transport=transport,
        )
        sealing = Sealing(
            where.root,
            memory or VersionFile.default(),
            pool=pool,
            kems=_kems(kem),
            shape=shape,
            keep_identifying_fields=keep_identifying_fields,
            retries=retries,
            resume=resume,
        )
        self._sealed = AsyncSealedTransport(sealing, outer, token or _setting("LACRE_TOKEN", "token"), dpop or _proof_key())
        self._pool_name = pool
        super().__init__(transport=self._sealed, base_url=ORIGIN, timeout=timeout, event_hooks=event_hooks)

    async def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - whatever is asked for
    ) -> httpx2.Response:
        """As `httpx2.AsyncClient.send`, but a redirect is an answer like any other: it is never followed."""
        return await super().send(request, stream=stream, auth=auth, follow_redirects=False)

    async def chat(self, messages: Messages, **params: Any) -> Reply:
        """One answer. messages: a string, or OpenAI-style messages; params: any OpenAI sampling parameter."""
        return Reply.parse(await self.post(CHAT_PATH, json=chat_body(messages, params, stream=False)))

    def chat_stream(self, messages: Messages, **params: Any) -> AsyncChatStream:
        """The answer's text, piece by piece as each record opens; once it has ended, its usage and receipt too.

        An answer that breaks off is resumed (`resume`). Iterating raises StreamBroken where it cannot be: the pieces until then
        are not the whole of it.
        """
        deltas = Deltas()
        return AsyncChatStream(self._pieces(chat_body(messages, params, stream=True), deltas), deltas)

    async def _pieces(self, body: Mapping[str, Any], deltas: Deltas) -> AsyncGenerator[str, None]:
        async with self.stream("POST", CHAT_PATH, json=body) as response:
            if response.is_error:
                await response.aread()
                check(response)
            deltas.facts = response.extensions[FACTS]
            with events_of(response) as events:
                async for event in events:
                    if text := deltas.feed(event.data):
                        yield text
            deltas.close(deltas.facts)

    @property
    def verification(self) -> Verification:
        """As `Client.verification`."""
        return self._sealed.verification

    async def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        return _models((await self._sealed.manifest()).pools, self._pool_name)


_OUTER_HEADERS: Final = {"user-agent": f"lacre/{__version__}"}


def _kems(kem: Kem | Sequence[Kem]) -> tuple[Kem, ...]:
    return (kem,) if isinstance(kem, Kem) else tuple(kem)


def _setting(variable: str, parameter: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise SettingsError(f"pass {parameter}=... or set {variable}; `lacre up` writes both into DIR/env")
    return value


def _proof_key() -> ProofKey | None:
    path = os.environ.get("LACRE_DPOP_KEY")
    return ProofKey.load(path) if path else None


def _models(pools: Mapping[str, Any], pool: str) -> tuple[str, ...]:
    if pool not in pools:
        raise SettingsError(f"the manifest has no pool {pool!r}: it has {', '.join(sorted(pools)) or 'none'}")
    models: tuple[str, ...] = pools[pool].models
    return models


def fetch_manifest(url: str | None = None, *, memory: Memory | None = None, verify: Verify = True) -> Manifest:
    """The manifest that the gateway serves, verified against the root pinned in `url` (`LACRE_URL`). Needs no token."""
    where = ConnectionString.parse(url or _setting("LACRE_URL", "url"))
    with httpx2.Client(base_url=where.base_url, headers=_OUTER_HEADERS, timeout=DEFAULT_TIMEOUT, verify=verify) as outer:
        return SealedTransport(Sealing(where.root, memory or VersionFile.default()), outer, "").manifest()
