"""The gateway's settings file. How it is read and how its errors are told: `lacre_fabric.settings`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from lacre.jws import b64u_decode
from lacre_fabric import settings as files
from lacre_fabric.settings import FilePath, Name, Nats, RootKey, Table

# Signatures that the gateway can check and not make. HS* would let whoever reads this file mint tokens, `none` anybody.
Algorithm = Literal["EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]

# A worker may claim work at the very end of its queue limit, on a clock that differs; its grant must still hold then.
GRANT_MARGIN: Final = 10.0


def _web_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise PydanticCustomError("web_url", "write an address such as https://gateway.example.com")
    return value.rstrip("/")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key_set(value: object) -> object:
    if not isinstance(value, (str, dict)):
        raise PydanticCustomError("jwks", "write the path of a JWKS file, or the key set itself as a table")
    return value


Port = Annotated[int, Field(ge=0, le=65535)]


class Tls(Table):
    """What HTTPS is served with: PEM files of the certificate with its chain, and of its private key."""

    certificate: FilePath
    key: FilePath


class Listen(Table):
    """Where HTTP is served. trusted_proxies: addresses whose X-Forwarded-For is believed. tls: None serves plain HTTP.

    drain_delay: seconds after SIGTERM in which `readyz` says no and requests are still taken, so that balancers can notice.
    drain: seconds that streams have to finish after that.
    header_timeout: seconds that a request's head may take to arrive. connections: how many are held at a time.
    """

    host: str = "127.0.0.1"
    port: Port = 8321
    trusted_proxies: tuple[str, ...] = ()
    tls: Tls | None = None
    drain_delay: Annotated[float, Field(ge=0, le=300)] = 0.0
    drain: PositiveInt = 30
    header_timeout: PositiveFloat = 15.0
    connections: PositiveInt = 10_000


class Admin(Table):
    """Where metrics and the admin API are served: on loopback, or with the TLS of `listen`, for tokens pass there."""

    host: str = "127.0.0.1"
    port: Port = 8322

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


class Tracing(Table):
    """Where traces go to: an OTLP collector's HTTP address, such as http://127.0.0.1:4318. sample: the share of requests."""

    endpoint: Annotated[str, AfterValidator(_web_url)]
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0


class Issuer(Table):
    """Who may sign access tokens. jwks: a file, or the key set itself.

    tenant: which tenant its tokens speak for; where it is absent, the token's own `tenant` claim says so.
    leeway: seconds that its clock and ours may differ.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)]
    jwks: Annotated[FilePath | dict[str, Any], BeforeValidator(_key_set)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    leeway: Annotated[float, Field(ge=0, le=120)] = 10.0


class Limits(Table):
    """What one gateway process takes on. Times in seconds."""

    requests_in_flight: PositiveInt = 2048
    concurrent_per_subject: PositiveInt = 32
    requests_per_minute: PositiveInt = 600  # per subject
    failed_auth_per_minute: PositiveInt = 60  # per address
    queue_limit: Annotated[float, Field(gt=0, le=30)] = 30.0  # 30 s: the life of a message in the queue
    grant_lifetime: PositiveFloat = 60.0
    body_timeout: PositiveFloat = 30.0


class Model(Table):
    """context: the most prompt tokens that one request can use."""

    context: PositiveInt


class Settings(Table):
    """The whole file. processes: how many serve the same port. admin: None serves neither metrics nor admin API."""

    gateway: Name
    public_url: Annotated[str, AfterValidator(_web_url)]
    trust: RootKey
    signing_key: FilePath
    audit: FilePath
    memory: FilePath | None = None  # the folder that remembers the newest manifest seen; None: forgotten with the process
    policies: FilePath | None = None  # None: the rules that ship with Lacre
    listen: Listen = Listen()
    admin: Admin | None = None
    tracing: Tracing | None = None
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    nats: Nats
    issuers: Annotated[tuple[Issuer, ...], Field(min_length=1)]
    limits: Limits = Limits()
    models: dict[str, Model] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.limits.grant_lifetime < self.limits.queue_limit + GRANT_MARGIN:
            raise PydanticCustomError(
                "grant_lifetime",
                "limits.grant_lifetime must exceed limits.queue_limit by {margin} s, or work that waited is refused",
                {"margin": int(GRANT_MARGIN)},
            )
        if self.admin is not None and self.listen.tls is None and not self.admin.loopback:
            raise PydanticCustomError(
                "admin", "admin.host must be a loopback address, or listen.tls be set: access tokens pass there"
            )
        names = [issuer.issuer for issuer in self.issuers]
        if len(set(names)) != len(names):
            raise PydanticCustomError("issuers", "issuers: each issuer may appear once; put all its keys in one jwks")
        return self

    @property
    def audit_origin(self) -> str:
        """The name of a new audit log: of this gateway, at this host. Logs of one key need names of their own."""
        return f"{urlsplit(self.public_url).hostname}/audit/{self.gateway}"

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def load(path: Path) -> Settings:
    """Raises SettingsError."""
    return files.load(Settings, path)


def parse(text: str, path: Path) -> Settings:
    """path: the file's place, for messages and relative paths. Raises SettingsError."""
    return files.parse(Settings, text, path)
