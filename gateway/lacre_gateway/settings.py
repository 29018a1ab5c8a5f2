"""The gateway's settings file (TOML), as frozen values that were checked whole.

Rules:
- A key that this version does not know is an error that names the nearest one it does: a misspelt limit is no limit.
- Every error names the key and what to write there, and repeats no value.
- Relative paths start at the folder of the settings file.
- The file names keys and credentials by path; it holds none of them itself.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from lacre.errors import InvalidMessage, SettingsError
from lacre.jws import b64u_decode

# Signatures that the gateway can check and not make. HS* would let whoever reads this file mint tokens, `none` anybody.
Algorithm = Literal["EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]

_ROOT_BYTES: Final = 32  # an Ed25519 public key (RFC 8032)

# A worker may claim work at the very end of its queue limit, on a clock that differs; its grant must still hold then.
GRANT_MARGIN: Final = 10.0


def _from_folder(path: Path, info: ValidationInfo) -> Path:
    return info.context["folder"] / path.expanduser() if info.context else path


def _root_key(value: str) -> str:
    try:
        size = len(b64u_decode(value))
    except InvalidMessage:
        size = 0
    if size != _ROOT_BYTES:
        raise PydanticCustomError("root_key", "copy the whole root key, as `lacre keys init` printed it (base64url)")
    return value


def _web_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise PydanticCustomError("web_url", "write an address such as https://gateway.example.com")
    return value.rstrip("/")


def _nats_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        raise PydanticCustomError("nats_url", "write an address such as nats://127.0.0.1:4222")
    if parts.username is not None or parts.password is not None:
        raise PydanticCustomError(
            "nats_url_secret", "take user and password out of the address: they belong in nats.credentials"
        )
    return value


def _key_set(value: object) -> object:
    if not isinstance(value, (str, dict)):
        raise PydanticCustomError("jwks", "write the path of a JWKS file, or the key set itself as a table")
    return value


FilePath = Annotated[Path, AfterValidator(_from_folder)]
# What `lacre_fabric.subjects` takes as one token of a NATS subject.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Listen(_Table):
    """Where HTTP is served. trusted_proxies: addresses whose X-Forwarded-For is believed."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    trusted_proxies: tuple[str, ...] = ()
    drain: PositiveInt = 30  # seconds that streams have to finish after SIGTERM


class Nats(_Table):
    """The message fabric, and the file with this gateway's own credential."""

    url: Annotated[str, AfterValidator(_nats_url)]
    credentials: FilePath


class Issuer(_Table):
    """Who may sign access tokens. jwks: a file, or the key set itself.

    tenant: which tenant its tokens speak for; where it is absent, the token's own `tenant` claim says so.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)]
    jwks: Annotated[FilePath | dict[str, Any], BeforeValidator(_key_set)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    leeway: Annotated[float, Field(ge=0, le=120)] = 10.0  # seconds that its clock and ours may differ


class Limits(_Table):
    """What one gateway process takes on. Times in seconds."""

    requests_in_flight: PositiveInt = 2048
    concurrent_per_subject: PositiveInt = 32
    requests_per_minute: PositiveInt = 600  # per subject
    failed_auth_per_minute: PositiveInt = 60  # per address
    queue_limit: Annotated[float, Field(gt=0, le=30)] = 30.0  # 30 s: the life of a message in the queue
    grant_lifetime: PositiveFloat = 60.0
    body_timeout: PositiveFloat = 30.0


class Model(_Table):
    """context: the most prompt tokens that one request can use."""

    context: PositiveInt


class Settings(_Table):
    """The whole file."""

    gateway: Name
    public_url: Annotated[str, AfterValidator(_web_url)]
    trust: Annotated[str, AfterValidator(_root_key)]
    signing_key: FilePath
    audit: FilePath
    policies: FilePath | None = None  # None: the rules that ship with Lacre
    listen: Listen = Listen()
    nats: Nats
    issuers: Annotated[tuple[Issuer, ...], Field(min_length=1)]
    limits: Limits = Limits()
    models: dict[str, Model] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.limits.grant_lifetime < self.limits.queue_limit + GRANT_MARGIN:
            raise PydanticCustomError(
                "grant_lifetime",
                "limits.grant_lifetime must exceed limits.queue_limit by {margin} s, or work that waited is refused",
                {"margin": int(GRANT_MARGIN)},
            )
        names = [issuer.issuer for issuer in self.issuers]
        if len(set(names)) != len(names):
            raise PydanticCustomError("issuers", "issuers: each issuer may appear once; put all its keys in one jwks")
        return self

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def load(path: Path) -> Settings:
    """Reads and checks the file. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise SettingsError(f"{path}: cannot read the settings file ({exc.strerror})") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{path}: the settings file must be UTF-8") from exc
    return parse(text, path)


def parse(text: str, path: Path) -> Settings:
    """Checks the text of a settings file. path: its place, for messages and for relative paths. Raises SettingsError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{path}: not TOML: {exc}") from exc
    try:
        return Settings.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False)
        raise SettingsError(f"{path}: {'; '.join(_explain(error) for error in errors if not _echoes(error, errors))}") from exc


def _echoes(error: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    """Pydantic also calls a list too short when its only entry was refused."""
    place = error["loc"]
    return error["type"] == "too_short" and any(other["loc"][: len(place)] == place for other in errors if other is not error)


def _explain(error: ErrorDetails) -> str:
    # Pydantic adds the branch of a union to the place; the file knows nothing of those.
    place = [part for part in error["loc"] if not str(part).startswith(("dict[", "function-"))]
    key = ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(str(place[-1]), _known_keys(place[:-1]), n=1, cutoff=0.0)
        return f"{key}: unknown key; the nearest known one is {nearest[0]!r}" if nearest else f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    message = error["msg"].replace("Input should be", "must be").replace("String should", "must")
    return f"{key}: {message}" if key else message


_INNER: Final[dict[str, type[BaseModel]]] = {
    "listen": Listen,
    "nats": Nats,
    "issuers": Issuer,
    "limits": Limits,
    "models": Model,
}


def _known_keys(place: list[int | str]) -> list[str]:
    table = _INNER[str(place[0])] if place else Settings
    return list(table.model_fields)
