"""Signs a person in at the settings' issuer: OpenID Connect Core 1.0, authorization code with PKCE (RFC 7636).

Rules:
- The issuer's metadata names where to go; the settings name the redirect address, which is exact.
- The ID token must verify by the issuer's keys, be for this client, and carry the nonce of this sign-in. Its subject must be
  the access token's.
- The access token decides what the person may do. It is judged as in any call: `auth.tokens`.
- An answer has a maximum size and time. Nothing of it reaches a log or a page.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import httpx2
import jwt

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.jose.jws import b64u, read_object
from lacre.runtime.authorities import trusting
from lacre.runtime.hosts import without_secrets
from lacre.runtime.json_objects import parse_object
from lacre.transport.fault_words import fault_in_words
from lacre_fabric.keys.secret_files import read_secret
from lacre_gateway.auth.claims import BadClaim, moment
from lacre_gateway.auth.fetch import MAX_DOCUMENT, TIME_LIMIT, TRUST, FetchFailed, fetch, make_client
from lacre_gateway.auth.jwks_remote import WELL_KNOWN
from lacre_gateway.auth.tokens import NotVerified, TrustedIssuer
from lacre_gateway.console.sessions import Flow
from lacre_gateway.gateway import Gateway
from lacre_gateway.settings import Console, fetchable

CALLBACK: Final = "/console/callback"
_MAX_CODE: Final = 4096  # characters of an authorization code: RFC 6749 names no bound, and issuers use some hundred
_REQUIRED: Final = ["iss", "aud", "exp", "iat", "sub", "nonce"]


class SignInFailed(LacreError):
    """The issuer did not sign the person in, or said so in a form that does not hold."""

    remedy = "Sign in again. If it fails again, look in the gateway's log."


@dataclass(frozen=True, slots=True)
class SignedIn:
    """at: when the person proved to be there, in seconds since the epoch; 0 if the issuer does not say."""

    token: str = field(repr=False)
    subject: str
    at: float


class SignIn:
    """For the console's issuer. Raises SettingsError if the secret cannot be read."""

    def __init__(self, gateway: Gateway, console: Console) -> None:
        self._gateway = gateway
        self._console = console
        self._secret = None if console.client_secret is None else _secret(console.client_secret)
        self._ca = next((one.ca for one in gateway.settings.issuers if one.issuer == console.issuer), None)
        self.issuer = str(console.issuer)
        self.redirect = console.url + CALLBACK

    @property
    def leeway(self) -> float:
        """Seconds that the issuer's clock may differ. Raises SignInFailed."""
        return self._trusted().leeway

    async def address(self, flow: Flow) -> str:
        """Where the browser goes. Raises FetchFailed."""
        found = await self._metadata()
        challenge = b64u(hashlib.sha256(flow.verifier.encode()).digest())
        asked = {
            "response_type": "code",
            "client_id": str(self._console.client_id),
            "redirect_uri": self.redirect,
            "scope": " ".join(dict.fromkeys(["openid", *self._console.scope.split()])),
            "state": flow.state,
            "nonce": flow.nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            "max_age": "0" if flow.again else str(int(self._console.session)),
        }
        if flow.again:
            asked["prompt"] = "login"
        if self._console.resource is not None:
            asked["resource"] = self._console.resource
        address = _endpoint(found, "authorization_endpoint")
        return f"{address}{'&' if '?' in address else '?'}{urlencode(asked)}"

    async def finish(self, flow: Flow, code: str, issuer: str | None) -> SignedIn:
        """issuer: as the answer names it (RFC 9207). Raises SignInFailed, FetchFailed or a Refusal."""
        if issuer is not None and issuer != self.issuer:
            raise SignInFailed("the answer is of another issuer")
        if not 0 < len(code) <= _MAX_CODE:
            raise SignInFailed("the answer has no code")
        said = await self._tokens(flow, code)
        access, identity = said.get("access_token"), said.get("id_token")
        if not isinstance(access, str) or not isinstance(identity, str):
            raise SignInFailed("the issuer's answer lacks an access token or an ID token")
        claims = await self._identity(identity, flow)
        examined = await self._gateway.authenticator.examine(f"Bearer {access}".encode())
        if examined.bound:
            raise SignInFailed("the access token is bound to a key: the console needs a bearer token")
        if examined.principal.subject != claims["sub"] or examined.principal.issuer != self.issuer:
            raise SignInFailed("the access token is somebody else's")
        try:
            at = moment(claims, "auth_time") if "auth_time" in claims else 0.0
        except BadClaim as exc:
            raise SignInFailed("the ID token's auth_time is no time") from exc
        return SignedIn(access, examined.principal.subject, min(at, self._gateway.clock()))

    async def _identity(self, token: str, flow: Flow) -> Mapping[str, Any]:
        """The claims of a good ID token (OpenID Connect Core 1.0 section 3.1.3.7). Raises SignInFailed."""
        trusted = self._trusted()
        try:
            key = await trusted.key(read_object(token.split(".", maxsplit=1)[0]))
            claims: dict[str, Any] = jwt.decode(
                token, key, algorithms=[key.algorithm_name], audience=self._console.client_id, issuer=self.issuer,
                leeway=trusted.leeway, options={"require": _REQUIRED},
            )  # fmt: skip
            audience = claims["aud"]
            several = isinstance(audience, list) and len(audience) > 1
            if claims.get("azp", self._console.client_id if not several else None) != self._console.client_id:
                raise SignInFailed("the ID token is for another client")
            if not hmac.compare_digest(str(claims["nonce"]).encode(), flow.nonce.encode()):
                raise SignInFailed("the ID token is of another sign-in")
        except SignInFailed:
            raise
        except (jwt.PyJWTError, LacreError, NotVerified, BadClaim, ValueError) as exc:
            raise SignInFailed("the ID token does not hold") from exc
        return claims

    def _trusted(self) -> TrustedIssuer:
        """Raises SignInFailed if new settings removed it."""
        found = next((one for one in self._gateway.authenticator.issuers if one.issuer == self.issuer), None)
        if found is None:
            raise SignInFailed("the settings no longer have the console's issuer")
        return found

    async def _metadata(self) -> Mapping[str, Any]:
        """Raises FetchFailed."""
        address = self.issuer.rstrip("/") + WELL_KNOWN
        async with make_client(address, await self._context()) as client:
            found = (await fetch(client, address, None)).value
        if not isinstance(found, dict) or found.get("issuer") != self.issuer:
            raise FetchFailed(f"{without_secrets(address)} is not the metadata of {self.issuer}")
        return found

    async def _tokens(self, flow: Flow, code: str) -> Mapping[str, Any]:
        """Exchanges the code (RFC 6749 section 4.1.3). Raises SignInFailed or FetchFailed."""
        address = _endpoint(await self._metadata(), "token_endpoint")
        form = {
            "grant_type": "authorization_code", "code": code, "redirect_uri": self.redirect,
            "client_id": str(self._console.client_id), "code_verifier": flow.verifier,
        }  # fmt: skip
        if self._secret is not None:
            form["client_secret"] = self._secret
        if self._console.resource is not None:
            form["resource"] = self._console.resource
        try:
            async with (
                asyncio.timeout(TIME_LIMIT),
                make_client(address, await self._context()) as client,
                client.stream("POST", address, data=form) as response,
            ):
                content = bytearray()
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > MAX_DOCUMENT:
                        raise FetchFailed("the issuer's answer is too long")
            if response.status_code != 200:
                raise SignInFailed(f"the issuer's token endpoint answered with status {response.status_code}")
            return parse_object(content, "the issuer's answer")
        except InvalidMessage as exc:
            raise SignInFailed("the issuer's answer is not a JSON object") from exc
        except (TimeoutError, httpx2.TimeoutException) as exc:
            raise FetchFailed(f"{without_secrets(address)} took longer than {TIME_LIMIT:.0f} s") from exc
        except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
            raise FetchFailed(f"{without_secrets(address)} cannot be reached: {fault_in_words(exc, TRUST)}") from exc

    async def _context(self) -> ssl.SSLContext | None:
        """Raises FetchFailed."""
        if self._ca is None:
            return None
        try:
            return await asyncio.to_thread(partial(trusting, self._ca, TRUST))
        except SettingsError as exc:
            raise FetchFailed(str(exc)) from exc


def _secret(path: Path) -> str:
    """Raises SettingsError."""
    words = read_secret(path).decode("ascii", "replace").split()
    if len(words) != 1:
        raise SettingsError(f"console.client_secret: {path} must hold one secret: the one that the issuer gave this client")
    return words[0]


def _endpoint(metadata: Mapping[str, Any], name: str) -> str:
    """Raises FetchFailed."""
    found = metadata.get(name)
    if not isinstance(found, str) or not fetchable(found, plain=True):
        raise FetchFailed(f"the issuer's metadata has no usable {name}")
    return found
