"""The worker's settings file (TOML)."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from lacre.jose.jws import b64u_decode
from lacre_backend.upstream.origin import OF_A_CONNECTION
from lacre_backend.upstream.routes import Route
from lacre_fabric.keys.kms import PLAIN
from lacre_fabric.operate import model_names
from lacre_fabric.settings import FilePath, KmsAddress, Name, Nats, RootKey, Table
from lacre_fabric.settings import load as load_table

_FORWARDED: Final = 8  # requests at a time where the settings do not say; what the upstream can take is its operator's to know
# Not for an upstream, whatever the settings say: who asks, and what the connection or its content is made of.
_NEVER_PASSED_ON: Final = frozenset(
    {"authorization", "cookie", "host", "content-length", "content-encoding", "accept-encoding", "expect", "user-agent"}
) | {name.decode() for name in OF_A_CONNECTION}

ModelName = Annotated[str, Field(pattern=model_names.PATTERN)]
Seconds = Annotated[float, Field(gt=0)]


class Model(Table):
    """A model to serve. path: a GGUF file; the default model where left out. name: its id; from the file's where left out."""

    path: FilePath | None = None
    name: ModelName | None = None
    # Left out, these are derived from the model and the machine; `lacre worker tune` measures the last four.
    context: PositiveInt | None = None  # tokens of one request
    beyond_training: bool = False  # whether that may be more than the file says it was trained for
    cells: PositiveInt | None = None  # tokens of all requests, in a unified cache
    slots: PositiveInt | None = None  # requests at a time
    threads: PositiveInt | None = None
    flash: bool | None = None  # flash attention
    unified: bool = False  # one cache for all slots in place of one each
    gpu_layers: Annotated[int, Field(ge=-1)] = -1  # layers to put on a GPU; -1 for all
    split_mode: Literal["none", "layer", "row"] = "layer"  # how several GPUs share a model
    main_gpu: NonNegativeInt = 0
    tensor_split: tuple[Annotated[float, Field(ge=0)], ...] = ()


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
        raise PydanticCustomError("passed_on", "is none that may go on to an upstream; leave it out")
    return name


class UpstreamModel(Table):
    """A model that the upstream serves. allow: what may be asked of it, `METHOD /path`, with a `*` for any one segment.

    known_as: its name there, where it is another one. members: of OpenAI's bodies, that go on beside the usual ones. fixed:
    members that are set whatever the client says. salt: the member that takes the scope of the prefix cache.
    """

    name: ModelName
    known_as: str | None = None
    allow: Annotated[tuple[Annotated[Route, BeforeValidator(_route)], ...], Field(min_length=1)]
    members: tuple[str, ...] = ()
    fixed: dict[str, bool | int | float | str] = Field(default_factory=dict)
    salt: str | None = None


class Upstream(Table):
    """An HTTP server on this host that answers in place of models of our own. origin: its scheme, host and port.

    health: a path that answers with a status of 200 to 299 once the server can work; without one it must only listen.
    headers: names of request headers that go on, beside `content-type` and `accept`. wait: seconds for its next byte.
    longest: seconds for a whole answer. largest_answer: bytes.
    """

    origin: Annotated[str, AfterValidator(_origin)]
    beyond_loopback: bool = False  # whether it may be on another host: prompts are then in the clear on the way, but for TLS
    health: Annotated[str, Field(pattern=r"^/[\x21-\x7e]*$")] | None = None
    models: Annotated[tuple[UpstreamModel, ...], Field(min_length=1)]
    headers: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$"), AfterValidator(_passed_on)], ...] = ()
    wait: Seconds = 120.0
    longest: Seconds = 600.0
    largest_answer: PositiveInt = 64 * 2**20

    @model_validator(mode="after")
    def _consistent(self) -> Upstream:
        if not self.beyond_loopback and not _is_loopback(urlsplit(self.origin).hostname or ""):
            raise PydanticCustomError(
                "loopback", "origin: is not on this host; run the worker beside it, or set beyond_loopback = true"
            )
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise PydanticCustomError("names", "models: two have one name; give one of them another")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(Table):
    """The whole file. keys: the folder with the pool's private keys; receipt_key: an Ed25519 key in PEM. Either models or an
    upstream, not both.

    kms: the address of the key that wraps both, or "plain:" (see `lacre_fabric.keys.kms`). memory: the folder that remembers
    the newest manifest seen; without one it is forgotten when the process ends.
    health: the file that says each second how the worker is, for `python -m lacre_backend.health`.
    """

    pool: Name
    node: Name
    trust: RootKey
    keys: FilePath
    receipt_key: FilePath
    kms: KmsAddress = PLAIN
    memory: FilePath | None = None
    health: FilePath | None = None
    nats: Nats
    models: tuple[Model, ...] = ()
    upstream: Upstream | None = None
    slots: PositiveInt | None = None  # requests at a time; what the models take together, or 8 of an upstream, where left out
    drain: Seconds = 30.0  # seconds that running requests have after SIGTERM

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Settings:
        if bool(self.models) == (self.upstream is not None):
            raise PydanticCustomError("served", "models: needs at least one entry, or a table [upstream] in place of them")
        return self

    @property
    def forwarded(self) -> int:
        """Requests at a time, of an upstream."""
        return self.slots or _FORWARDED

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def load(path: Path) -> Settings:
    """Reads and checks the file. Raises SettingsError."""
    return load_table(Settings, path)
