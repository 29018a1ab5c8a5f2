"""The access token of each request: given, asked for by a callable, or issued to OAuth2 client credentials.

`lacre.transport.oauth` decides what to ask and when a token is old; the requests are sent here.
"""

from __future__ import annotations

import time
from functools import partial
from inspect import isawaitable
from typing import Final

import httpx2

from lacre.jose import dpop
from lacre.jose.dpop import ProofKey
from lacre.runtime.forks import PerLoop, PerProcess
from lacre.transport.mapped_errors import mapped
from lacre.transport.network_causes import Dialled
from lacre.transport.oauth import MAX_ANSWER, AsyncToken, ClientCredentials, Issued, Token, given
from lacre.transport.single_flight import AsyncSingleFlight, SingleFlight

_NONE_YET: Final = Issued("", float("-inf"))


class Bearer:
    """The access token of each request. OAuth2's is asked for through `outer`, with its CA, proxy and timeouts, and bound to
    the key where there is one.
    """  # fmt: skip

    def __init__(self, source: Token, outer: PerProcess[httpx2.Client], key: ProofKey | None) -> None:
        """key: what the token is bound to, where it is."""
        self.key = key
        self._source = source
        self._outer = outer
        self._issued = _NONE_YET
        self._flight = SingleFlight()

    def token(self, refused: str | None = None) -> str:
        """refused: one that the gateway does not take, to get another; the same again where there is none."""
        source = self._source
        if isinstance(source, str):
            return source
        if not isinstance(source, ClientCredentials):
            return given(source())
        issued = self._issued
        if not issued.fresh(refused):
            self._flight.run(lambda: self._issued is issued, partial(self._renew, source))
        return self._issued.token

    def _renew(self, source: ClientCredentials) -> None:
        began = time.monotonic()
        response, content = self._answer(source, None)
        if self.key is not None and (nonce := wanted_nonce(response, content)) is not None:
            response, content = self._answer(source, nonce)
        self._issued = Issued.parse(response.status_code, content, began)

    def _answer(self, source: ClientCredentials, nonce: str | None) -> tuple[httpx2.Response, bytes]:
        outer = self._outer.get()
        request = token_request(outer, source, self.key, nonce)
        Dialled().watch(request)
        with mapped("the token server", "token_url"):
            response = outer.send(request, stream=True, follow_redirects=False)
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

    def __init__(self, source: AsyncToken, outer: PerLoop[httpx2.AsyncClient], key: ProofKey | None) -> None:
        self.key = key
        self._source = source
        self._outer = outer
        self._issued = _NONE_YET
        self._flight = AsyncSingleFlight()

    async def token(self, refused: str | None = None) -> str:
        source = self._source
        if isinstance(source, str):
            return source
        if not isinstance(source, ClientCredentials):
            came = source()
            return given(await came if isawaitable(came) else came)
        issued = self._issued
        if not issued.fresh(refused):
            await self._flight.run(lambda: self._issued is issued, partial(self._renew, source))
        return self._issued.token

    async def _renew(self, source: ClientCredentials) -> None:
        began = time.monotonic()
        response, content = await self._answer(source, None)
        if self.key is not None and (nonce := wanted_nonce(response, content)) is not None:
            response, content = await self._answer(source, nonce)
        self._issued = Issued.parse(response.status_code, content, began)

    async def _answer(self, source: ClientCredentials, nonce: str | None) -> tuple[httpx2.Response, bytes]:
        outer = self._outer.get()
        request = token_request(outer, source, self.key, nonce)
        Dialled().awatch(request)
        with mapped("the token server", "token_url"):
            response = await outer.send(request, stream=True, follow_redirects=False)
            try:
                content = b""
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_ANSWER:
                        break
            finally:
                await response.aclose()
        return response, content


def token_request(
    outer: httpx2.Client | httpx2.AsyncClient, source: ClientCredentials, key: ProofKey | None, nonce: str | None
) -> httpx2.Request:
    """key: what the token is to be bound to (RFC 9449 section 5). nonce: what the server asks a proof to have."""
    proof = {} if key is None else {dpop.HEADER: key.proof("POST", source.token_url, nonce=nonce)}
    return outer.build_request("POST", source.token_url, headers={**source.headers(), **proof}, content=source.form())


def wanted_nonce(response: httpx2.Response, content: bytes) -> str | None:
    """What a server asks for that takes no proof without a nonce of its own (RFC 9449 section 8)."""
    return response.headers.get("dpop-nonce") if response.status_code == 400 and b'"use_dpop_nonce"' in content else None
