"""The gateway's settings file. `lacre_fabric.settings` reads it and reports its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from lacre.errors import SettingsError
from lacre.jose.jws import b64u_decode
from lacre.runtime.hosts import is_loopback
from lacre.wire.header import MAX_SEALED_REQUEST
from lacre_fabric import settings as files
from lacre_fabric.nats.roles import MAX_PROCESSES
from lacre_fabric.nats.subjects import check_gateway, process_name
from lacre_fabric.settings import FilePath, Name, Nats, RootKey, Table

# Signatures that the gateway can check and not make. With HS*, every reader of this file could mint tokens; with `none`,
# anybody.
Algorithm = Literal["EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]

# A worker may claim work at the end of its queue limit, on a clock that differs; its grant must still be valid then.
GRANT_MARGIN: Final = 10.0
# Several whole heads: with less, honest clients on slow networks would displace each other.
MIN_HELD: Final = 2**20


def fetchable(url: str, *, plain: bool = False) -> bool:
    """Whether the gateway may fetch a document there. plain: also over http, from this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        return False
    if not host or parts.username is not None or parts.fragment:
        return False
    return parts.scheme == "https" or (plain and parts.scheme == "http" and is_loopback(host))


def _web_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise PydanticCustomError("web_url", "write an address such as https://gateway.example.com")
    if parts.username is not None:
        raise PydanticCustomError("web_url_secret", "take user and password out of the address: it is no place for a secret")
    return value.rstrip("/")


def _origin(value: str) -> str:
    """As a browser serialises it (RFC 6454 section 6.2): any other spelling would never match."""
    parts = urlsplit(value)
    plain = parts.scheme == "http" and parts.hostname is not None and is_loopback(parts.hostname)
    usual = {"https": 443, "http": 80}.get(parts.scheme)
    if not (parts.scheme == "https" or plain) or not parts.hostname or parts.port == usual or "@" in parts.netloc:
        raise PydanticCustomError("origin", "write an origin such as https://app.example.com (http on loopback only)")
    if value != f"{parts.scheme}://{parts.netloc.lower()}" or not value.isascii() or "*" in value:
        raise PydanticCustomError("origin_form", "write scheme, host and port alone, in small letters: no path, and no `*`")
    return value


def _gateway_name(value: str) -> str:
    try:
        return check_gateway(value)
    except SettingsError as exc:
        raise PydanticCustomError("gateway_name", "{reason}", {"reason": str(exc)}) from exc


def _key_set(value: object) -> object:
    if not isinstance(value, (str, dict)):
        raise PydanticCustomError("jwks", "write the path of a JWKS file, or the key set itself as a table")
    return value


def _key_address(value: str) -> str:
    if not fetchable(value, plain=True):
        raise PydanticCustomError("jwks_url", "write the https address of a JWKS (http on loopback only)")
    return value


def _claim_path(value: object) -> object:
    """`realm_access.roles`, or the same as a list, for names that contain dots. A URL is one name."""
    if isinstance(value, str):
        path = (value,) if "://" in value else tuple(value.split("."))
    else:
        path = tuple(value) if isinstance(value, list) else ()
    if not path or not all(isinstance(name, str) and name for name in path):
        raise PydanticCustomError("claim", "write the claim's name, with dots before inner names, or a list of names")
    return path


ClaimPath = Annotated[tuple[str, ...], BeforeValidator(_claim_path)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Tls(Table):
    """For HTTPS: PEM files of the certificate with its chain, and of its private key."""

    certificate: FilePath
    key: FilePath


class Listen(Table):
    """Where HTTP is served. trusted_proxies: addresses whose X-Forwarded-For is believed. tls: None serves plain HTTP.

    drain_delay: seconds after SIGTERM in which `readyz` says no and requests are still accepted, so that balancers notice.
    drain: seconds that streams have to finish after that. header_timeout: seconds that a request's head may take to arrive.
    connections: how many at a time. connections_per_address: of these, from one address or IPv6 /64 that is not a trusted
    proxy. held_bytes: of incomplete heads, and of bodies whose sender is not known yet. origins: whose pages may read answers
    in a browser.
    """

    host: str = "127.0.0.1"
    port: Port = 8321
    trusted_proxies: tuple[str, ...] = ()
    tls: Tls | None = None
    drain_delay: Annotated[float, Field(ge=0, le=300)] = 0.0
    drain: PositiveInt = 30
    header_timeout: PositiveFloat = 15.0
    connections: PositiveInt = 10_000
    connections_per_address: PositiveInt = 1000
    held_bytes: Annotated[int, Field(ge=MIN_HELD)] = 64 * 2**20
    origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], Field(max_length=64)] = ()


class Admin(Table):
    """Where metrics and the admin API are served: on loopback, or with the TLS of `listen`, because tokens pass there."""

    host: str = "127.0.0.1"
    port: Port = 8322

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


class Console(Table):
    """The operators' console, at the admin listener.

    url: the origin at which people open it. issuer: the one of `issuers` that signs people in; None: only `lacre admin open`
    does. client_id: the console's id at that issuer. client_secret: a private file; None for a public client. scope: asked for
    beside `openid`. resource: the API that the access token is asked for (RFC 8707). session: the most seconds that a sign-in
    holds. step_up: seconds after a sign-in in which changes are accepted. keep_days: how long the minutes of the overview stay.
    """

    url: Annotated[str, AfterValidator(_origin)]
    issuer: str | None = None
    client_id: Annotated[str, Field(min_length=1)] | None = None
    client_secret: FilePath | None = None
    scope: str = "lacre:admin"
    resource: str | None = None
    session: Annotated[float, Field(ge=60, le=86400)] = 8 * 3600.0
    step_up: Annotated[float, Field(ge=1, le=3600)] = 300.0
    keep_days: Annotated[int, Field(ge=1, le=366)] = 30

    @property
    def host(self) -> str:
        """As browsers send it in `Host`."""
        return urlsplit(self.url).netloc

    @property
    def secure(self) -> bool:
        return self.url.startswith("https:")

    def moved(self, ports: int) -> Console:
        """The console of another process, whose admin port is higher by so much."""
        parts = urlsplit(self.url)
        return (
            self
            if parts.port is None
            else self.model_copy(update={"url": f"{self.url.removesuffix(f':{parts.port}')}:{parts.port + ports}"})
        )


class Tracing(Table):
    """Where traces go to: an OTLP collector's HTTP address, such as http://127.0.0.1:4318. sample: the share of requests."""

    endpoint: Annotated[str, AfterValidator(_web_url)]
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0


def _webhook_address(value: str) -> str:
    if not fetchable(value, plain=True):
        raise PydanticCustomError("webhook", "write the https address of a webhook (http on loopback only)")
    return value


AlertLimit = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "money_per_month"]


class Webhook(Table):
    """Where alerts go to when 80 % of a limit are used, and when it is used up.

    url: gets a POST for each alert. secret: a private file with the secret that signs them, of Standard Webhooks (`whsec_…`).
    ca: the PEM file of the CA for its address; default: the system's CAs. limits: which are watched.
    """

    url: Annotated[str, AfterValidator(_webhook_address)]
    secret: FilePath
    ca: FilePath | None = None
    limits: tuple[AlertLimit, ...] = ("tokens_per_day", "money_per_month")


class Claims(Table):
    """The issuer's names for further claims. scopes: default: `scope` or `scp`."""

    tenant: ClaimPath = ("tenant",)
    groups: ClaimPath = ("groups",)
    scopes: ClaimPath | None = None
    plan: ClaimPath = ("plan",)


class Issuer(Table):
    """An issuer that may sign access tokens.

    jwks: its keys, as a file or as the set itself. jwks_url: where they are fetched. Default: OpenID Connect Discovery.
    ca: the PEM file of the CA for its https addresses; default: the system's CAs. tenant: the tenant of all its tokens;
    default: the token's own claim. default_tenant: for tokens without that claim; default: they are refused. claims_elsewhere:
    for a token that refers to another place for groups, scopes, plan or tenant: `refuse` it, or `ignore` that and accept it
    without them. leeway: seconds that its clock and ours may differ. token_lifetime: the most seconds that a token may live.
    stale_limit: seconds for which fetched keys are used when the issuer cannot be reached.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)]
    jwks: Annotated[FilePath | dict[str, Any], BeforeValidator(_key_set)] | None = None
    jwks_url: Annotated[str, AfterValidator(_key_address)] | None = None
    ca: FilePath | None = None
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    default_tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    claims: Claims = Claims()
    claims_elsewhere: Literal["refuse", "ignore"] = "refuse"
    leeway: Annotated[float, Field(ge=0, le=120)] = 10.0
    token_lifetime: PositiveFloat = 31 * 86400.0
    stale_limit: PositiveFloat = 86400.0

    @model_validator(mode="after")
    def _reachable(self) -> Issuer:
        if self.jwks is not None and self.jwks_url is not None:
            raise PydanticCustomError("jwks", "an issuer has its keys in one place: write either jwks or jwks_url")
        if self.ca is not None and self.jwks is not None:
            raise PydanticCustomError("issuer_ca", "`ca` is for keys that the gateway fetches: remove it, or remove `jwks`")
        if self.ca is not None and not (self.jwks_url or self.issuer).startswith("https:"):
            raise PydanticCustomError("issuer_ca_clear", "`ca` is for https: write an https address, or remove `ca`")
        if self.tenant is not None and self.default_tenant is not None:
            raise PydanticCustomError("tenant", "with `tenant`, all tokens are for that tenant: remove `default_tenant`")
        if self.jwks is None and self.jwks_url is None and not fetchable(self.issuer, plain=True):
            raise PydanticCustomError(
                "discovery",
                "an issuer must have an https address (http on loopback only): correct it, or name its jwks_url",
            )
        return self


class GatewayLimits(Table):
    """The limits of one gateway process. Times in seconds, sizes in bytes.

    body_bytes: of sealed bodies that it holds at once; handing one on costs up to three times its bytes, and the Helm chart
    gives a gateway 1 GiB. body_bytes_per_subject: of these, of one caller.
    calls_per_address: calls a minute of one address to the manifest, and as many to the admin listener.
    refused_per_minute: requests of one caller that may be refused, each with its audit entries. refused_per_address: likewise.
    """

    requests_in_flight: PositiveInt = 2048
    concurrent_per_subject: PositiveInt = 256  # beside the plans' limits over all processes
    body_bytes: Annotated[int, Field(ge=MAX_SEALED_REQUEST)] = 128 * 2**20
    body_bytes_per_subject: Annotated[int, Field(ge=MAX_SEALED_REQUEST)] = 32 * 2**20
    refused_per_minute: PositiveInt = 60
    refused_per_address: PositiveInt = 600  # many callers may share an address
    longest_stream: Annotated[float, Field(gt=0, le=86400)] = 3600.0  # from admission to the last byte
    failed_auth_per_minute: PositiveInt = 60  # per address
    calls_per_address: PositiveInt = 3000  # a client fetches the manifest when it starts, and many may share an address
    queue_limit: Annotated[float, Field(gt=0, le=30)] = 30.0  # 30 s: the life of a message in the queue
    grant_lifetime: PositiveFloat = 60.0
    body_timeout: PositiveFloat = 30.0


class AuditKeeping(Table):
    """How long audit logs grow, and how long old ones stay. None: for ever.

    keep_days: from a log's last entry on; 0: until another log continues it.
    """

    rotate_days: PositiveInt | None = None
    rotate_entries: Annotated[int, Field(ge=1000)] | None = None  # a log for less would cost more than its entries
    keep_days: Annotated[int, Field(ge=0)] | None = None


class ModelLimits(Table):
    """context: the most prompt tokens that one request can use."""

    context: PositiveInt


class GatewaySettings(Table):
    """The whole file. processes: how many serve the same port. admin: None serves neither metrics nor admin API.
    console: None serves none.
    """

    gateway: Annotated[Name, AfterValidator(_gateway_name)]
    public_url: Annotated[str, AfterValidator(_web_url)]
    trust: RootKey
    signing_key: FilePath
    audit: FilePath
    audit_logs: AuditKeeping = AuditKeeping()
    memory: FilePath | None = None  # the folder that remembers the newest manifest seen; None: only in memory
    policies: FilePath | None = None  # None: the rules that ship with Lacre
    listen: Listen = Listen()
    admin: Admin | None = None
    console: Console | None = None
    tracing: Tracing | None = None
    alerts: Webhook | None = None
    processes: Annotated[int, Field(ge=1, le=MAX_PROCESSES)] = 1
    nats: Nats
    issuers: Annotated[tuple[Issuer, ...], Field(min_length=1)]
    limits: GatewayLimits = GatewayLimits()
    models: dict[str, ModelLimits] = Field(default_factory=dict)
    log_level: Literal["info", "warning", "error"] = "info"
    _process: int | None = PrivateAttr(default=None)
    _shared: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _whole(self) -> GatewaySettings:
        return self._consistent()

    def _consistent(self) -> GatewaySettings:
        if self.limits.grant_lifetime < self.limits.queue_limit + GRANT_MARGIN:
            raise PydanticCustomError(
                "grant_lifetime",
                "limits.grant_lifetime must exceed limits.queue_limit by {margin} s, or work that waited is refused",
                {"margin": int(GRANT_MARGIN)},
            )
        if self.admin is not None and self.listen.tls is None and not self.admin.loopback:
            raise PydanticCustomError(
                "admin", "set admin.host to a loopback address, or set listen.tls: access tokens pass there"
            )
        names = [issuer.issuer for issuer in self.issuers]
        if self.console is not None:
            self._check_console(self.console, names)
        if len(set(names)) != len(names):
            raise PydanticCustomError("issuers", "issuers: each issuer may appear once; put all its keys in one jwks")
        return self

    def _check_console(self, console: Console, names: list[str]) -> None:
        if self.admin is None:
            raise PydanticCustomError("console", "console: it is served at the admin listener: add a table [admin]")
        if not self.admin.loopback and not console.secure:
            raise PydanticCustomError("console_url", "console.url must be https: the admin listener serves TLS")
        if (console.issuer is None) != (console.client_id is None):
            raise PydanticCustomError("console_issuer", "console: write both issuer and client_id, or neither")
        if console.issuer is not None and console.issuer not in names:
            raise PydanticCustomError("console_issuer", "console.issuer must be one of [[issuers]], whose keys verify tokens")

    def checked(self) -> GatewaySettings:
        """These settings, which were put together from two files. Raises SettingsError if they do not fit together."""
        try:
            return self._consistent()
        except PydanticCustomError as exc:
            raise SettingsError(f"{exc.message()} (some of the new settings need a restart)") from exc

    @property
    def shared(self) -> bool:
        """Whether other processes serve the same port."""
        return self._shared

    @property
    def instance(self) -> str:
        """The name of this process: on the fabric, in the audit log, in leases."""
        return self.gateway if self._process is None else process_name(self.gateway, self._process)

    def as_instance(self, number: int) -> GatewaySettings:
        """The settings of one of several gateways of this name, each on its own machine. Raises SettingsError."""
        if self.processes > 1:
            raise SettingsError("several instances must have one process each: remove `processes`")
        if not 0 <= number < MAX_PROCESSES:
            raise SettingsError(f"a gateway's credential is for {MAX_PROCESSES} instances, numbered from 0")
        own = self.model_copy()
        own._process = number
        return own

    def for_process(self, number: int, port: int) -> GatewaySettings:
        """The settings of one of several processes: unshareable parts are its own. port: the one that all of them serve."""
        name, admin = str(number), self.admin
        if admin is not None and admin.port:
            admin = admin.model_copy(update={"port": admin.port + number})
        own = self.model_copy(
            update={
                "audit": self.audit / name,
                "memory": None if self.memory is None else self.memory / name,
                "listen": self.listen.model_copy(update={"port": port}),
                "admin": admin,
                "console": None if self.console is None else self.console.moved(number),
            }
        )
        own._process, own._shared = number, True
        return own

    @property
    def audit_origin(self) -> str:
        """The name of a new audit log: this gateway's, at this host. Logs of one key need different names."""
        return f"{urlsplit(self.public_url).hostname}/audit/{self.instance}"

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def shipped() -> Path:
    """The folder of the rules that ship with Lacre: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).parent
    packaged = package / "policies"
    return packaged if packaged.is_dir() else package.parents[1] / "policies"


def load(path: Path) -> GatewaySettings:
    """Raises SettingsError."""
    return files.load(GatewaySettings, path)


def parse(text: str, path: Path) -> GatewaySettings:
    """path: the file's place, for messages and relative paths. Raises SettingsError."""
    return files.parse(GatewaySettings, text, path)
