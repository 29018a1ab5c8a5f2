"""The state folder of one machine's Lacre: which files it holds, how they are made, and what they say to each other.

    root.pem signer.pem        signs root statements; signs manifests (in production each on a machine of its own)
    issuer.pem issuer.jwks     the development token issuer
    gateway/                   gateway.toml, its grant key, its credential, audit.jsonl
    pools/NAME/                the pool's keys and receipt key
    workers/NAME/              worker.toml and credential
    trust/                     the chain of root statements and the published manifest
    nats/ logs/                nats-server's state; one log a process
    site.json                  the pools, their models, and where nats-server listens
    env                        LACRE_URL and LACRE_TOKEN, for a shell

Everything is created once and found again; secrets are 0600.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.jws import b64u, raw_public_key
from lacre.manifest import Document, Manifest, Pool, PoolKey, RootStatement
from lacre.padding import SHAPES
from lacre.signing import sign_manifest, sign_statement
from lacre.trust import ConnectionString, verify
from lacre_fabric import poolkeys, roles, tokens
from lacre_fabric.keyfiles import ed25519, read_ed25519, write_secret
from lacre_fabric.roles import Credential, Role

GATEWAY_ID: Final = "g1"
NODE: Final = "n1"
DAY: Final = 86400.0
DRAIN: Final = 5  # seconds that running requests have when `lacre up` ends; the supervisor's patience is longer
SIGNER_LIFETIME: Final = 90 * DAY
SIGNER_RENEWAL: Final = 30 * DAY  # before its end, the root says the signer's name again
MANIFEST_LIFETIME: Final = DAY
KEY_LIFETIME: Final = 7 * DAY  # of a pool key in the manifest, counted anew at each publication until it is rotated


@dataclass(frozen=True, slots=True)
class Site:
    """A state folder. pools: each with its models. Methods that read raise SettingsError."""

    folder: Path
    pools: Mapping[str, Sequence[str]]
    issuer: str = "lacre"

    @classmethod
    def load(cls, folder: Path) -> Site:
        """The site that `lacre up` wrote down last."""
        return cls(folder, _read_json(folder / "site.json")["pools"])

    @property
    def nats_url(self) -> str:
        """Where nats-server listens, or listened last."""
        return str(_read_json(self.folder / "site.json")["nats"])

    def save(self, nats_url: str) -> None:
        write_secret(self.folder / "site.json", json.dumps({"pools": self.pools, "nats": nats_url}).encode())

    @property
    def gateway_settings(self) -> Path:
        return self.folder / "gateway" / "gateway.toml"

    def worker_settings(self, pool: str) -> Path:
        return self.folder / "workers" / pool / "worker.toml"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def create(self) -> None:
        """Makes what is missing; what is there stays."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder / "logs").mkdir(exist_ok=True)
        for name in ("root", "signer", "issuer", "gateway/grant"):
            ed25519(self.folder / f"{name}.pem")
        for pool in self.pools:
            ed25519(self.folder / "pools" / pool / "receipt.pem")
            poolkeys.create(self.folder / "pools" / pool / "keys")
        key_set = tokens.key_set(self._key("issuer"))
        (self.folder / "issuer.jwks").write_text(json.dumps(key_set))

    def roles(self) -> list[Role]:
        """Every role of the fabric, with its credential."""
        return [
            roles.provisioner(self.credential("provisioner")),
            roles.gateway(self.credential(f"gateway-{GATEWAY_ID}"), GATEWAY_ID, tuple(self.pools)),
            *(roles.worker(self.credential(f"worker-{pool}-{NODE}"), pool, NODE) for pool in self.pools),
        ]

    def credential(self, name: str) -> Credential:
        return Credential.load_or_new(self.credential_file(name), name)

    def credential_file(self, name: str) -> Path:
        return self.folder / "fabric" / f"{name}.json"

    @property
    def root(self) -> bytes:
        """The public root key: what applications pin."""
        return raw_public_key(self._key("root"))

    def connection_string(self, base_url: str) -> str:
        return str(ConnectionString(base_url, self.root))

    def token(self, subject: str) -> str:
        """A development access token."""
        return tokens.issue(self._key("issuer"), subject)

    def write_env(self, base_url: str) -> Path:
        """`env`: what a shell sources to use this site. It holds a token, so it is 0600."""
        path = self.folder / "env"
        url, token = self.connection_string(base_url), self.token("developer")
        write_secret(path, f"export LACRE_URL='{url}'\nexport LACRE_TOKEN='{token}'\n".encode())
        return path

    def sign_manifest(self, now: float | None = None) -> bytes:
        """The next version of the manifest, signed and kept; the document to publish."""
        now = time.time() if now is None else now
        manifest = sign_manifest(self._manifest(self._next_version(), now), self._key("signer"))
        document = Document(self._chain(now), manifest).encode()
        verify(document, self.root, now)  # what would not verify is not published
        write_secret(self.folder / "trust" / "manifest.json", document)
        return document

    def _next_version(self) -> int:
        """Counts every manifest ever signed here; kept before it is used, so that no version is signed twice."""
        path = self.folder / "trust" / "version"
        version = int(path.read_text()) + 1 if path.exists() else 1
        write_secret(path, str(version).encode())
        return version

    def _key(self, name: str) -> Ed25519PrivateKey:
        return read_ed25519(self.folder / f"{name}.pem")

    def _manifest(self, version: int, now: float) -> Manifest:
        pools = {name: self._pool(name, models, now) for name, models in self.pools.items()}
        gateway_key = raw_public_key(self._key("gateway/grant"))
        return Manifest(self.issuer, version, now, now + MANIFEST_LIFETIME, gateway_key, pools)

    def _pool(self, name: str, models: Sequence[str], now: float) -> Pool:
        keys = poolkeys.load(self.folder / "pools" / name / "keys").values()
        receipt_key = raw_public_key(self._key(f"pools/{name}/receipt"))
        return Pool(tuple(models), tuple(PoolKey(key.config, now + KEY_LIFETIME) for key in keys), receipt_key, SHAPES)

    def _chain(self, now: float) -> tuple[tuple[str, ...], ...]:
        """The root's statements, with a fresh one where the last grows old."""
        path = self.folder / "trust" / "chain.json"
        if path.exists():
            kept = json.loads(path.read_text())
            if now < kept["renew_after"]:
                return tuple(map(tuple, kept["chain"]))
        statement = RootStatement(raw_public_key(self._key("signer")), now + SIGNER_LIFETIME)
        # The same root's older statements say nothing more than the newest: one is enough.
        chain = (sign_statement(statement, self._key("root")),)
        write_secret(path, json.dumps({"chain": chain, "renew_after": now + SIGNER_LIFETIME - SIGNER_RENEWAL}).encode())
        return chain

    def write_settings(self, nats_url: str, port: int, models: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
        """The settings files of gateway and workers. models: for each pool, the tables of its worker's `[[models]]`."""
        gateway = {
            "gateway": GATEWAY_ID,
            "public_url": f"http://127.0.0.1:{port}",
            "trust": b64u(self.root),
            "signing_key": "grant.pem",
            "audit": "audit.jsonl",
            "listen": {"host": "127.0.0.1", "port": port, "drain": DRAIN},
            "nats": {"url": nats_url, "credentials": str(self.credential_file(f"gateway-{GATEWAY_ID}"))},
            "issuers": [
                {
                    "issuer": tokens.ISSUER,
                    "audience": tokens.AUDIENCE,
                    "algorithms": ["EdDSA"],
                    "jwks": str(self.folder / "issuer.jwks"),
                }
            ],
        }
        self.save(nats_url)
        _write_toml(self.gateway_settings, gateway)
        for pool in self.pools:
            worker = {
                "pool": pool,
                "node": NODE,
                "drain": DRAIN,
                "trust": b64u(self.root),
                "keys": str(self.folder / "pools" / pool / "keys"),
                "receipt_key": str(self.folder / "pools" / pool / "receipt.pem"),
                "nats": {"url": nats_url, "credentials": str(self.credential_file(f"worker-{pool}-{NODE}"))},
                "models": list(models[pool]),
            }
            _write_toml(self.worker_settings(pool), worker)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise SettingsError(f"{path} is missing or damaged: start `lacre up` on this state first") from exc


def _write_toml(path: Path, values: Mapping[str, object]) -> None:
    """Scalars and lists first, then tables, then arrays of tables; enough for our own settings files."""
    lines = [f"{name} = {_scalar(value)}" for name, value in values.items() if not _is_table(value)]
    for name, value in values.items():
        tables = [value] if isinstance(value, Mapping) else value if _is_table(value) else ()
        heading = f"[{name}]" if isinstance(value, Mapping) else f"[[{name}]]"
        for table in tables:
            lines += ["", heading, *(f"{key} = {_scalar(inner)}" for key, inner in table.items())]
    write_secret(path, ("\n".join(lines) + "\n").encode())


def _is_table(value: object) -> TypeGuard[Any]:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _scalar(value: object) -> str:
    """JSON's strings, numbers, truth values and lists of them are TOML's too."""
    return json.dumps(value)
