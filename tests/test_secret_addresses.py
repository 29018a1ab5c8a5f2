"""A URL may hold a secret: a user and a password, or a query. No error shows it, in any room.

Each place that takes a URL has a row. It gets URLs of each kind and fails: it refuses the URL, or nothing serves it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import lacre
from lacre.client import fetch_manifest
from lacre.errors import LacreError
from lacre.runtime.hosts import without_secrets
from lacre.transport.oauth import ClientCredentials
from lacre.trust.chain import ConnectionString
from lacre_backend.settings import WorkerSettings
from lacre_fabric.keys import kms
from lacre_fabric.keys.kms.address import endpoint
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.roles import Credential
from lacre_fabric.operate import catching_up
from lacre_fabric.operate.pool_upstreams import UpstreamServer
from lacre_fabric.settings import NatsServers, validated
from lacre_gateway.admin.calls import AdminApi
from lacre_gateway.auth.fetch import fetch, make_client
from lacre_gateway.auth.jwks_remote import RemoteKeys
from lacre_gateway.settings import GatewaySettings, Issuer, Tracing, Webhook

SECRET = "s3cret"
CLOSED = "127.0.0.1:1"  # nothing listens there
ROOT = "A" * 43
KINDS = {
    "password": f"//user:{SECRET}@{CLOSED}/path",
    "user": f"//{SECRET}@{CLOSED}/path",
    "query": f"//{CLOSED}/path?code={SECRET}",
    "fragment": f"//{CLOSED}/path#{SECRET}",
    "both": f"//user:{SECRET}@{CLOSED}/path?code={SECRET}",
    "no port": f"//user:{SECRET}@127.0.0.1:x/path?code={SECRET}",
    "no host": f"//user:{SECRET}@[::1/path?code={SECRET}",
}


class _Settings:
    """A settings table, with one key that holds the URL. rest: the other keys."""

    def __init__(self, kind: type, key: str, **rest: object) -> None:
        self.kind, self.key, self.rest = kind, key, rest

    def __call__(self, url: str) -> None:
        validated(self.kind, {self.key: url, **self.rest}, Path("/x/settings.toml"))
        raise LacreError("the address is accepted, and used elsewhere in this table")


def _fetched(url: str) -> None:
    async def run() -> None:
        async with make_client(url) as client:
            await fetch(client, url, None)

    asyncio.run(run())


def _issuer_keys(url: str) -> None:
    """The reason goes to the log and to `lacre doctor`."""

    async def run() -> None:
        log = _Log()
        keys = RemoteKeys("https://issuer.example", url, ["EdDSA"], place="issuers.0", log=log)  # type: ignore[arg-type]
        try:
            raise LacreError(f"{await keys.fetched()} {log.said}")
        finally:
            await keys.close()

    asyncio.run(run())


class _Log:
    """What a logger is told."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def warning(self, event: str, **fields: object) -> None:
        self.said.append((event, fields))


def _nats(url: str) -> None:
    servers = validated(NatsServers, {"url": url}, Path("/x/site.json")).servers
    asyncio.run(Connection.open(servers, Credential.new("provisioner")))


def _kms(url: str) -> None:
    kms.check(url)
    raise LacreError("the address is accepted: an option of another name is for the service")


def _admin(url: str) -> None:
    with AdminApi(url, "token") as api:
        api._call("GET", "/v1/tenants", None)  # type: ignore[type-var]


def _token_server(url: str) -> None:
    source = ClientCredentials(url, "id", SECRET)
    with lacre.Client(f"lacre+http://{CLOSED}?trust={ROOT}", token=source, retries=0) as client:
        client.chat("x")
    raise LacreError(repr(source))


# By scheme, because each place wants its own.
PLACES: dict[str, tuple[str, Callable[[str], object]]] = {
    "connection string": ("lacre+http", lambda url: ConnectionString.parse(f"{url}&trust={ROOT}")),
    "connection string, used": ("lacre+http", fetch_manifest),
    "token server": ("http", _token_server),
    "fetch": ("http", _fetched),
    "fetch, another scheme": ("nonsense", _fetched),
    "issuer keys": ("http", _issuer_keys),
    "admin API": ("http", _admin),
    "admin API, another scheme": ("ftp", _admin),
    "upstream of a pool": ("http", lambda url: UpstreamServer(url).check()),
    "upstream of a pool, elsewhere": (
        "https",
        lambda url: UpstreamServer(url.replace("127.0.0.1", "up.example")).check(),
    ),
    "gateway of a state folder": ("http", catching_up.served),
    "NATS": ("nats", _nats),
    "KMS": ("vault", _kms),
    "KMS, a file": ("file", _kms),
    "KMS endpoint": ("ftp", endpoint),
    "settings: gateway": ("http", _Settings(GatewaySettings, "public_url")),
    "settings: tracing": ("http", _Settings(Tracing, "endpoint")),
    "settings: webhook": ("ftp", _Settings(Webhook, "url", secret="x")),
    "settings: key set": ("ftp", _Settings(Issuer, "jwks_url", issuer="https://i.example", audience="a", algorithms=["EdDSA"])),
    "settings: issuer": ("ftp", _Settings(Issuer, "issuer", audience="a", algorithms=["EdDSA"])),
    "settings: worker": ("http", _Settings(WorkerSettings, "upstream")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_no_error_shows_a_secret_of_a_url(place: str, kind: str) -> None:
    scheme, call = PLACES[place]
    url = f"{scheme}:{KINDS[kind]}"
    assert SECRET in url
    with pytest.raises(LacreError) as caught:
        call(url)
    told = "".join(traceback.format_exception(caught.value, limit=0))
    assert SECRET not in told, told
    assert SECRET not in f"{caught.value!r} {getattr(caught.value, 'remedy', '')}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@host:8443/a/b?code=x#y", "https://host:8443/a/b"),
        ("http://[::1]:80/", "http://[::1]:80/"),
        ("https://host", "https://host"),
        ("https://host:x/", "an unreadable address"),
        ("nonsense", "an unreadable address"),
        ("user:pw@host", "an unreadable address"),
        ("https://[::1", "an unreadable address"),
    ],
)
def test_what_is_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
