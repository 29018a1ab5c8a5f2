"""What each process of a deployment gets, where they run apart: one folder each, with its settings and the secrets it may have.

    STATE/bundles/nats/           nats.conf, which includes lacre.conf, with every role's password
    STATE/bundles/gateway/        gateway.toml, its grant key, its credential, and the issuer's public keys
    STATE/bundles/worker-POOL/    worker.toml, the pool's receipt key, and its workers' credential
    STATE/bundles/…-REGION/       the last two for each region, where regions have names
    STATE/data/nats, …/gateway    empty: for what these two write

Rules
- No bundle holds the root, the signer or another process's secret: who has one folder has no more than that process.
- A pool's private keys are in none: they come and go, so workers are given `STATE/pools/POOL/keys` itself, to read.
- Settings name the places that the images know (docs/containers.md), not those of this machine.
- A pool and its models are added to those that the state knows already. What a person wrote into settings stays, such as a
  certificate in nats.conf. lacre.conf is written anew: it is all passwords and limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from lacre.errors import SettingsError
from lacre.jose.jws import b64u
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import KEY_BYTES
from lacre.wire.wiping import overwrite
from lacre_fabric.keys.secret_files import read_secret, write_secret
from lacre_fabric.nats import subjects
from lacre_fabric.operate import dev_issuer, nats_conf, served_models, settings_files
from lacre_fabric.operate.nats_server import configuration
from lacre_fabric.operate.served_models import DEFAULT_MODEL
from lacre_fabric.operate.site import Site, gateway_of, worker_of
from lacre_fabric.settings import NatsServers, validated
from lacre_fabric.work import model_names

NATS_PORT: Final = 4222
GATEWAY_PORT: Final = 8321
STATE: Final = "/var/lib/lacre"  # in an image: what a process writes, and a pool's keys
DRAIN: Final = 25  # seconds that running requests have; what ends containers waits longer
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - a container's own network; what is published of it, its runtime decides


_NATS_CONF: Final = b"""# Yours to edit: TLS, a cluster. What stands below wins over lacre.conf, which is written anew.
include ./lacre.conf
"""
_INCLUDED: Final = re.compile(rb"""^\s*include\s+["']?(\./)?lacre\.conf""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Bundles:
    """nats_url: where the message server will be for the others; public_url: where the gateway will be for clients."""

    site: Site
    nats_url: str
    public_url: str

    def write(self) -> None:
        """Makes what is missing, keys too, and brings every bundle up to date. Raises SettingsError."""
        check_addresses(self.nats_url, self.public_url)
        replace(self, site=_with_what_is_there(self.site))._write()

    def _write(self) -> None:
        self.site.create()
        self._write_nats()
        self.site.save(self.nats_url, self.public_url)
        for region in self.site.regions:
            self._write_gateway(region)
            for pool in self.site.pools:
                self._write_worker(pool, region)
        for name in ("nats", *(_in("gateway", region) for region in self.site.regions)):
            (self.site.folder / "data" / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder(self, name: str) -> Path:
        return self.site.folder / "bundles" / name

    def _write_nats(self) -> None:
        folder = self.folder("nats")
        ours = configuration(EVERYWHERE, NATS_PORT, "/data", self.site.replicated_roles())
        own = _persons_own(folder / "nats.conf", ours)
        write_secret(folder / "lacre.conf", nats_conf.encode(ours))
        if own is not None:
            write_secret(folder / "nats.conf", _NATS_CONF + own)

    def _write_gateway(self, region: str) -> None:
        folder, name = self.folder(_in("gateway", region)), gateway_of(region)
        self._copy("gateway/grant.pem", folder / "grant.pem")
        self._copy(f"fabric/gateway-{name}.json", folder / "credential.json")
        write_secret(folder / "issuer.jwks", (self.site.folder / "issuer.jwks").read_bytes())
        values = {"gateway": name, "public_url": self.public_url, "trust": b64u(self.site.root), "nats": self._nats(region)}
        issuer = {"issuer": dev_issuer.ISSUER, "audience": dev_issuer.AUDIENCE, "algorithms": ["EdDSA"], "jwks": "issuer.jwks"}
        defaults = {
            "signing_key": "grant.pem",
            "audit": f"{STATE}/audit",
            "memory": f"{STATE}/manifests",
            "listen": {"host": EVERYWHERE, "port": GATEWAY_PORT, "drain": DRAIN},
            "issuers": [issuer],
        }
        settings_files.write(folder / "gateway.toml", values, defaults)

    def _write_worker(self, pool: str, region: str) -> None:
        folder = self.folder(_in(f"worker-{pool}", region))
        self._copy(f"pools/{pool}/receipt.pem", folder / "receipt.pem")
        self._copy(f"fabric/{worker_of(pool, region)}.json", folder / "credential.json")
        document, new = settings_files.opened(folder / "worker.toml")
        values = {"pool": pool, "trust": b64u(self.site.root), "nats": self._nats(region)}
        settings_files.update(document, values)
        if new:
            files = {"keys": f"{STATE}/keys", "receipt_key": "receipt.pem", "health": "/tmp/health"}  # noqa: S108 - a container's
            node = {"node": "n1", "drain": DRAIN}  # each worker says its own name on the command line
            settings_files.update(document, {**node, **files})
        if "upstream" not in document:
            self._keep_models(folder / "worker.toml", document, self.site.pools[pool])
        settings_files.save(folder / "worker.toml", document)

    def _keep_models(self, path: Path, document: MutableMapping[str, Any], names: Sequence[str]) -> None:
        """The pool's models are served. What a person wrote of others, or of those that went, waits beside the settings."""
        there = {one.get("name") for one in settings_files.tables(path, document, "models")}
        known = there | served_models.waiting_names(path)
        served_models.keep(
            path,
            document,
            [{"name": name} if name in known else _table(name) for name in names],
            same=lambda one, other: one.get("name") == other.get("name"),
            derived=lambda one: dict(one) == _table(str(one.get("name"))),
        )

    def _nats(self, region: str) -> dict[str, str]:
        own = {} if region == subjects.DEFAULT_REGION else {"region": region}
        return {"url": self.nats_url, "credentials": "credential.json", **own}

    def _copy(self, name: str, to: Path) -> None:
        content = read_secret(self.site.folder / name)
        write_secret(to, content)
        overwrite(content)


def _table(name: str) -> dict[str, str]:
    return {"name": name, "path": f"/models/{name}.gguf"}


def _persons_own(path: Path, ours: Mapping[str, object]) -> bytes | None:
    """What a person wrote into the nats.conf of an older version, which had all in one file, as JSON. None for a newer file.

    Raises SettingsError where that cannot be told.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return b""
    if _INCLUDED.search(text):
        return None
    try:
        before = json.loads(text)
        return nats_conf.lines({name: value for name, value in before.items() if name not in ours})
    except (ValueError, AttributeError, RecursionError):
        raise SettingsError(
            f"{path} has been edited: take out the accounts and what else Lacre wrote, and put `include ./lacre.conf` there"
        ) from None


def check_addresses(nats_url: str, public_url: str) -> None:
    """What others will be given, before anything is made of it. Raises SettingsError."""
    validated(NatsServers, {"url": nats_url}, Path("--nats"))
    if urlsplit(public_url).scheme not in ("http", "https"):
        raise SettingsError(f"--public-url {public_url}: write an address such as https://gateway.example.com")
    try:
        ConnectionString.parse(str(ConnectionString(public_url.rstrip("/"), bytes(KEY_BYTES))))
    except SettingsError as exc:
        raise SettingsError(
            f"--public-url {public_url}: no client would take it ({exc}); write an address such as https://gateway.example.com"
        ) from exc


def _with_what_is_there(site: Site) -> Site:
    """The state's own site where it has one, with these pools and models added. Raises SettingsError."""
    there = Site.load_or_new(site.folder, {})
    pools = {name: list(models) for name, models in there.pools.items()}
    for name, models in site.pools.items():
        known = pools.setdefault(name, [])
        known += [model for model in models if model not in known]
        if not known:
            known.append(DEFAULT_MODEL)
    for model in {model for models in pools.values() for model in models}:
        if not model_names.is_name(model):
            raise SettingsError(
                f"{model!r} is no model's id: use 1 to {model_names.MAX_NAME} printable ASCII characters, no space"
            )
    return replace(there if there.pools else site, pools=pools)


def _in(name: str, region: str) -> str:
    """The folder of one region's processes."""
    return name if region == subjects.DEFAULT_REGION else f"{name}-{region}"
