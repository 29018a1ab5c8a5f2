"""The access token of each request: a given one, a callable's, or one issued for OAuth2 client credentials.

`lacre.transport.oauth` decides what to ask and when a token is old; this file sends the requests.
"""

from __future__ import annotations

import time
from functools import partial

import httpx2

from lacre.jose.dpop import ProofKey
from lacre.runtime.forks import PerLoop
from lacre.transport.dialled import Dialled
from lacre.transport.mapped_errors import mapped
from lacre.transport.oauth import (
    MAX_ANSWER,
    NONE_YET,
    AsyncToken,
    ClientCredentials,
    Issued,
    RenewedToken,
    agiven,
    token_request,
    wanted_nonce,
)
from lacre.transport.single_flight import AsyncSingleFlight


class AsyncBearer:
    """The access token of each request. OAuth2 tokens are requested through `outer`, with its CA, proxy and timeouts, and bound
    to the key if there is one.
    """  # fmt: skip

    def __init__(self, source: AsyncToken, outer: PerLoop[httpx2.AsyncClient], key: ProofKey | None) -> None:
        """key: the token is bound to it, if given."""
        self.key = key
        self._source = source
        self._outer = outer
        self._issued = NONE_YET
        self._flight = AsyncSingleFlight()

    async def token(self, refused: str | None = None) -> str:
        """refused: a token that the gateway refused, to get another; the same token again if there is no other."""
        source = self._source
        if isinstance(source, str):
            return source
        if isinstance(source, RenewedToken):
            return await agiven(source(refused))
        if not isinstance(source, ClientCredentials):
            return await agiven(source())
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
