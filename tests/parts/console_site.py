"""A whole deployment with a console for each gateway: a real nats-server, gateways as processes, a worker that answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lacre_fabric.operate.nats_server import free_port
from parts.chat_app import ChatApp
from parts.oidc_provider import Provider
from parts.stage import LiveStage
from parts.stage.settings import own_issuer

READERS = """
@id("readers")
permit (principal in Group::"acme/readers", action in [Action::"admin:usage", Action::"admin:audit"], resource);
"""
OPERATORS = """
@id("operators")
permit (principal in Group::"acme/operators", action in Action::"admin", resource);
"""


@dataclass
class Consoles:
    """live: the deployment. urls: of the gateways' consoles."""

    live: LiveStage
    urls: Sequence[str]


def _tables(live: LiveStage, url: str, provider: Provider | None) -> str:
    tables = own_issuer(live.site) + f'\n[admin]\nport = {url.rpartition(":")[2]}\n[console]\nurl = "{url}"\n'
    if provider is None:
        return tables
    return f"""{tables}
        issuer = "{provider.url}"
        client_id = "console"
        scope = "lacre:console"
        resource = "urn:lacre:ES256"
        [[issuers]]
        issuer = "{provider.url}"
        audience = "lacre"
        algorithms = ["ES256", "RS256", "EdDSA"]
        [issuers.claims]
        tenant = "org.id"
        groups = "realm_access.roles"
    """


@asynccontextmanager
async def with_consoles(folder: Path, provider: Provider | None = None, *, gateways: int = 1) -> AsyncIterator[Consoles]:
    async with LiveStage(folder, {"default": ("tiny",)}) as live:
        await live.start_fabric(gateways=[f"g{number}" for number in range(2, gateways + 1)])
        await live.node(ChatApp())
        live.write_settings({"name": "tiny"})
        urls = [f"http://127.0.0.1:{free_port()}" for _ in range(gateways)]
        for url in urls:
            live.gateway(_tables(live, url, provider), drain=2)
        (live.policies / "roles.cedar").write_text(READERS + OPERATORS)
        await live.start_gateways()
        yield Consoles(live, urls)
