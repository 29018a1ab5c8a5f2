"""Writes a folder for each process of a distributed deployment, with its settings and only its own secrets.

    STATE/bundles/nats/           nats.conf, which includes lacre.conf, with every role's password
    STATE/bundles/gateway/        gateway.toml, its grant key, its credential, and the issuer's public keys
    STATE/bundles/worker-POOL/    worker.toml, the pool's receipt key, and its workers' credential
    STATE/bundles/…-REGION/       the last two for each region, if regions have names
    STATE/data/nats, …/gateway    empty: data folders of these two

Rules:
- No bundle contains the root, the signer or another process's secret. A stolen folder gives no more than that process has.
- No bundle contains a pool's private keys, because they change. Workers read `STATE/pools/POOL/keys` itself.
- Settings contain the paths of the container images (docs/containers.md), not of this machine.
- A new pool and its models are added to those in the state. Settings that a person edited stay, for example a certificate in
  nats.conf. lacre.conf is rewritten whole: it contains only passwords and limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
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
from lacre_fabric.operate import dev_issuer, nats_conf, pool_upstreams, served_models, settings_files
from lacre_fabric.operate.nats_server import configuration
from lacre_fabric.operate.site import Site, gateway_of, worker_of
from lacre_fabric.settings import NatsServers, validated
from lacre_fabric.work import model_names
from lacre_fabric.work.model_names import DEFAULT_MODEL

NATS_PORT: Final = 4222
GATEWAY_PORT: Final = 8321
STATE: Final = "/var/lib/lacre"  # in an image: a process's data and a pool's keys
DRAIN: Final = 25  # seconds that running requests have; the container's stop timeout must be longer
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - inside a container's own network; its runtime publishes ports


_NATS_CONF: Final = b"""# Edit this file for TLS or a cluster. Lacre rewrites lacre.conf; settings below override it.
include ./lacre.conf
"""
_INCLUDED: Final = re.compile(rb"""^\s*include\s+["']?(\./)?lacre\.conf""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Bundles:
    """The bundles of a site. nats_url: the NATS servers' address for the other processes. public_url: the gateway's for
    clients.
    """

    site: Site
    nats_url: str | Sequence[str]
    public_url: str

    def write(self) -> None:
        """Creates what is missing, including keys, and updates every bundle. Raises SettingsError."""
        check_addresses(self.nats_url, self.public_url)
        replace(self, site=_with_what_is_there(self.site))._write()

    def _write(self) -> None:
        self.site.create()
        self.write_nats()
        self.site.save(self.nats_url, self.public_url)
        for region in self.site.regions:
            self._write_gateway(region)
        for pool in self.site.pools:
            self.write_workers(pool)
        for name in ("nats", *(_in("gateway", region) for region in self.site.regions)):
            (self.site.folder / "data" / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder(self, name: str) -> Path:
        return self.site.folder / "bundles" / name

    def write_workers(self, pool: str) -> None:
        """The pool's bundle in each region. Raises SettingsError."""
        for region in self.site.regions:
            self._write_worker(pool, region)

    def worker_folders(self, pool: str) -> list[Path]:
        return [self.folder(_in(f"worker-{pool}", region)) for region in self.site.regions]

    def write_nats(self, unheard: Collection[str] = ()) -> None:
        """unheard: as `accounts` takes it. Raises SettingsError."""
        folder = self.folder("nats")
        ours = configuration(EVERYWHERE, NATS_PORT, "/data", self.site.replicated_roles(), unheard)
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
            node = {"node": "n1", "drain": DRAIN}  # each worker gives its own name on the command line
            settings_files.update(document, {**node, **files})
        upstream = pool_upstreams.of_site(self.site.folder).get(pool)
        if upstream is not None:
            upstream.put(folder / "worker.toml", document, self.site.pools[pool])
        elif "upstream" not in document:
            self._keep_models(folder / "worker.toml", document, self.site.pools[pool])
        settings_files.save(folder / "worker.toml", document)

    def _keep_models(self, path: Path, document: MutableMapping[str, Any], names: Sequence[str]) -> None:
        """Serves the pool's models. A person's settings for other or removed models move to the file beside the settings."""
        there = {one.get("name") for one in settings_files.tables(path, document, "models")}
        known = there | served_models.waiting_names(path)
        served_models.keep(
            path,
            document,
            [{"name": name} if name in known else _table(name) for name in names],
            same=lambda one, other: one.get("name") == other.get("name"),
            derived=lambda one: dict(one) == _table(str(one.get("name"))),
        )

    def _nats(self, region: str) -> dict[str, object]:
        own = {} if region == subjects.DEFAULT_REGION else {"region": region}
        return {"url": self.nats_url, "credentials": "credential.json", **own}

    def _copy(self, name: str, to: Path) -> None:
        content = read_secret(self.site.folder / name)
        write_secret(to, content)
        overwrite(content)


def _table(name: str) -> dict[str, str]:
    return {"name": name, "path": f"/models/{name}.gguf"}


def _persons_own(path: Path, ours: Mapping[str, object]) -> bytes | None:
    """A person's own text in the nats.conf of an older version, which was one file, in JSON. None for a newer file.

    Raises SettingsError if that cannot be determined.
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
            f"{path} was edited: remove the accounts and Lacre's other entries, then add `include ./lacre.conf`"
        ) from None


def check_addresses(nats_url: str | Sequence[str], public_url: str) -> None:
    """Checks the addresses for the other processes before anything is made. Raises SettingsError."""
    validated(NatsServers, {"url": nats_url}, Path("--nats"))
    if urlsplit(public_url).scheme not in ("http", "https"):
        raise SettingsError(f"--public-url {public_url}: write an address such as https://gateway.example.com")
    try:
        ConnectionString.parse(str(ConnectionString(public_url.rstrip("/"), bytes(KEY_BYTES))))
    except SettingsError as exc:
        raise SettingsError(
            f"--public-url {public_url}: clients reject it ({exc}); write an address such as https://gateway.example.com"
        ) from exc


def _with_what_is_there(site: Site) -> Site:
    """The state's existing site with these pools and models added; the given one if there is none. Raises SettingsError."""
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
                f"{model!r} is not a valid model id: use 1 to {model_names.MAX_NAME} printable ASCII characters, no space"
            )
    return replace(there if there.pools else site, pools=pools)


def _in(name: str, region: str) -> str:
    """The folder of one region's processes."""
    return name if region == subjects.DEFAULT_REGION else f"{name}-{region}"
