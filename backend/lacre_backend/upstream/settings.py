"""The table `[upstream]` of the worker's settings file."""

from __future__ import annotations

from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from lacre.runtime.hosts import is_loopback
from lacre_backend.upstream.origin import OF_A_CONNECTION
from lacre_backend.upstream.routes import Route
from lacre_fabric.settings import ModelName, Seconds, Table

# Headers that are never forwarded, regardless of the settings: they identify the caller, or describe the connection or its
# content.
_NEVER_PASSED_ON: Final = frozenset(
    {"authorization", "cookie", "host", "content-length", "content-encoding", "accept-encoding", "expect", "user-agent"}
) | {name.decode() for name in OF_A_CONNECTION}


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
    if name in _NEVER_PASSED_ON or name.startswith("lacre-"):
        raise PydanticCustomError("passed_on", "must not be forwarded to an upstream; remove it")
    return name


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


class Upstream(Table):
    """An HTTP server on this host that answers instead of our own models. origin: its scheme, host and port.

    - health: a path that answers with a status of 200 to 299 once the server can work; without it, the server must only listen.
    - headers: names of request headers to forward, in addition to `content-type` and `accept`.
    - wait: seconds for its next byte. longest: seconds for a whole answer. largest_answer: bytes.
    """

    origin: Annotated[str, AfterValidator(_origin)]
    beyond_loopback: bool = False  # whether it may be on another host: without TLS, prompts then cross the network unencrypted
    health: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$")] | None = None
    models: Annotated[tuple[UpstreamModel, ...], Field(min_length=1)]
    headers: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$"), AfterValidator(_passed_on)], ...] = ()
    wait: Seconds = 120.0
    longest: Seconds = 600.0
    largest_answer: PositiveInt = 64 * 2**20

    @model_validator(mode="after")
    def _consistent(self) -> Upstream:
        if not self.beyond_loopback and not is_loopback(urlsplit(self.origin).hostname or ""):
            raise PydanticCustomError(
                "loopback", "origin: not on this host; run the worker on its host, or set beyond_loopback = true"
            )
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise PydanticCustomError("names", "models: two models share a name; rename one")
        return self
