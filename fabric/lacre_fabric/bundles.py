"""What each process of a deployment gets, where they run apart: one folder each, with its settings and the secrets it may have.

    STATE/bundles/nats/           nats.conf, with every role's password
    STATE/bundles/gateway/        gateway.toml, its grant key, its credential, and the issuer's public keys
    STATE/bundles/worker-POOL/    worker.toml, the pool's receipt key, and its workers' credential
    STATE/data/nats, …/gateway    empty: for what these two write

Rules
- No bundle holds the root, the signer or another process's secret: who has one folder has no more than that process.
- A pool's private keys are in none: they come and go, so workers are given `STATE/pools/POOL/keys` itself, to read.
- Settings name the places that the images know (docs/containers.md), not those of this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.jws import b64u
from lacre.wire.wiping import overwrite
from lacre_fabric import tokens
from lacre_fabric.keyfiles import read_secret, write_secret
from lacre_fabric.server import configuration
from lacre_fabric.site import GATEWAY_ID, Site, write_toml

NATS_PORT: Final = 4222
GATEWAY_PORT: Final = 8321
STATE: Final = "/var/lib/lacre"  # in an image: what a process writes, and a pool's keys
DRAIN: Final = 25  # seconds that running requests have; what ends containers waits longer
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - a container's own network; what is published of it, its runtime decides


@dataclass(frozen=True, slots=True)
class Bundles:
    """nats_url: where the message server will be for the others; public_url: where the gateway will be for clients."""

    site: Site
    nats_url: str
    public_url: str

    def write(self) -> None:
        """Makes what is missing, keys too, and writes every bundle anew. Raises SettingsError."""
        self.site.create()
        self.site.save(self.nats_url, self.public_url)
        roles = self.site.replicated_roles()
        nats = configuration(EVERYWHERE, NATS_PORT, "/data", roles)
        write_secret(self.folder("nats") / "nats.conf", json.dumps(nats, indent=1).encode())
        self._write_gateway()
        for pool in self.site.pools:
            self._write_worker(pool)
        for name in ("nats", "gateway"):
            (self.site.folder / "data" / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder(self, name: str) -> Path:
        return self.site.folder / "bundles" / name

    def _write_gateway(self) -> None:
        folder = self.folder("gateway")
        self._copy("gateway/grant.pem", folder / "grant.pem")
        self._copy(f"fabric/gateway-{GATEWAY_ID}.json", folder / "credential.json")
        write_secret(folder / "issuer.jwks", (self.site.folder / "issuer.jwks").read_bytes())
        settings = {
            "gateway": GATEWAY_ID,
            "public_url": self.public_url,
            "trust": b64u(self.site.root),
            "signing_key": "grant.pem",
            "audit": f"{STATE}/audit",
            "memory": f"{STATE}/manifests",
            "listen": {"host": EVERYWHERE, "port": GATEWAY_PORT, "drain": DRAIN},
            "nats": self._nats(),
            "issuers": [{"issuer": tokens.ISSUER, "audience": tokens.AUDIENCE, "algorithms": ["EdDSA"], "jwks": "issuer.jwks"}],
        }
        write_toml(folder / "gateway.toml", settings)

    def _write_worker(self, pool: str) -> None:
        folder = self.folder(f"worker-{pool}")
        self._copy(f"pools/{pool}/receipt.pem", folder / "receipt.pem")
        self._copy(f"fabric/worker-{pool}.json", folder / "credential.json")
        settings = {
            "pool": pool,
            "node": "n1",  # each worker says its own on the command line
            "drain": DRAIN,
            "trust": b64u(self.site.root),
            "keys": f"{STATE}/keys",
            "receipt_key": "receipt.pem",
            "health": "/tmp/health",  # noqa: S108 - a container's own, in memory
            "nats": self._nats(),
            "models": [{"name": name, "path": f"/models/{name}.gguf"} for name in self.site.pools[pool]],
        }
        write_toml(folder / "worker.toml", settings)

    def _nats(self) -> dict[str, str]:
        return {"url": self.nats_url, "credentials": "credential.json"}

    def _copy(self, name: str, to: Path) -> None:
        content = read_secret(self.site.folder / name)
        write_secret(to, content)
        overwrite(content)
