"""The table `[upstream]` of the worker's settings file."""

from __future__ import annotations

from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from lacre.runtime.hosts import is_loopback
from lacre_backend.upstream.fields import may_be_a_credential, may_be_passed_on
from lacre_backend.upstream.routes import Route
from lacre_fabric.settings import FilePath, ModelName, Seconds, Table

# Each origin is asked for its health continuously; a fleet behind more than this many belongs behind a balancer of its own.
MAX_ORIGINS: Final = 64


def _route(value: object) -> Route:
    try:
        return Route.parse(value if isinstance(value, str) else "")
    except ValueError:
        raise PydanticCustomError("route", "write a method and a path, such as 'POST /v1/models/encoder:predict'") from None


def _origin(value: str) -> str:
    parts = urlsplit(value)
    try:
        plain = value == f"{parts.scheme}://{parts.netloc}" and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        plain = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise PydanticCustomError("origin", "write scheme, host and port alone, such as http://127.0.0.1:8080")
    return value


def _passed_on(name: str) -> str:
    if not may_be_passed_on(name):
        raise PydanticCustomError("passed_on", "must not be forwarded to an upstream; remove it")
    return name


def _credential(name: str) -> str:
    if not may_be_a_credential(name):
        raise PydanticCustomError("credential", "describes the message itself; name the header that the server reads")
    return name


_HeaderName = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
_Origin = Annotated[str, AfterValidator(_origin)]


class UpstreamModel(Table):
    """A model that the upstream serves. allow: permitted requests as `METHOD /path`, with a `*` for any one segment.

    - known_as: its name there, if different. members: further members of OpenAI's bodies to forward.
    - fixed: members that are set regardless of the client. salt: the member with the scope of the prefix cache.
    """

    name: ModelName
    known_as: str | None = None
    allow: Annotated[tuple[Annotated[Route, BeforeValidator(_route)], ...], Field(min_length=1)]
    members: tuple[str, ...] = ()
    fixed: dict[str, bool | int | float | str] = Field(default_factory=dict)
    salt: str | None = None


class UpstreamCredential(Table):
    """A header that every request to the upstream gets. file: holds its value, or the part after the scheme.

    - scheme: the authentication scheme that begins the value (RFC 9110 section 11.4). Default: `Bearer` for `authorization`,
      none for other headers.
    """

    header: Annotated[_HeaderName, AfterValidator(_credential)] = "authorization"
    scheme: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,32}$")] = ""
    file: FilePath

    @model_validator(mode="before")
    @classmethod
    def _usual_scheme(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("header", "authorization") == "authorization":
            return {"scheme": "Bearer", **values}
        return values


class Upstream(Table):
    """HTTP servers on this host that answer instead of our own models.

    - origin: scheme, host and port of one server. origins: of several that serve the same.
    - health: a path that answers with a status of 200 to 299 once a server can work; without it, a server must only listen.
    - health_every: seconds between checks. health_failures: failed checks in a row after which a server counts as down.
    - credentials: headers that the worker sets. headers: names of request headers to forward, in addition to those of the
      content.
    - wait: seconds for the next byte. longest: seconds for a whole answer. largest_answer: bytes.
    """

    origin: _Origin | None = None
    origins: Annotated[tuple[_Origin, ...], Field(max_length=MAX_ORIGINS)] = ()
    beyond_loopback: bool = False  # whether they may be on other hosts: without TLS, prompts then cross the network unencrypted
    health: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$")] | None = None
    health_every: Annotated[float, Field(ge=0.1, le=3600)] = 2.0
    health_failures: Annotated[int, Field(ge=1, le=100)] = 2
    credentials: tuple[UpstreamCredential, ...] = ()
    models: Annotated[tuple[UpstreamModel, ...], Field(min_length=1)]
    headers: tuple[Annotated[_HeaderName, AfterValidator(_passed_on)], ...] = ()
    wait: Seconds = 120.0
    longest: Seconds = 600.0
    largest_answer: PositiveInt = 64 * 2**20

    @property
    def addresses(self) -> tuple[str, ...]:
        """All origins."""
        return self.origins or (() if self.origin is None else (self.origin,))

    @model_validator(mode="after")
    def _consistent(self) -> Upstream:
        if (self.origin is None) == (not self.origins):
            raise PydanticCustomError("origins", "origin: write `origin` for one server, or `origins` for several")
        for number, address in enumerate(self.addresses):
            key = f"origins.{number}" if self.origins else "origin"
            if address in self.addresses[:number]:
                raise PydanticCustomError("origins", "{key}: is in the list already; remove it", {"key": key})
            if not self.beyond_loopback and not is_loopback(urlsplit(address).hostname or ""):
                raise PydanticCustomError(
                    "loopback",
                    "{key}: not on this host; run the worker on its host, or set beyond_loopback = true",
                    {"key": key},
                )
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise PydanticCustomError("names", "models: two models share a name; rename one")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Upstream:
        """A header with a credential comes from one file, and not from clients."""
        for number, credential in enumerate(self.credentials):
            if credential.header in (*self.headers, *(other.header for other in self.credentials[:number])):
                raise PydanticCustomError(
                    "credentials",
                    "credentials.{number}.header: is also in another table or in `headers`; remove one of them",
                    {"number": number},
                )
        return self
