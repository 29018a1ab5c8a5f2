"""The state folder of one machine's Lacre: its files, how they are created, and how they refer to each other.

    root.pem signer.pem        sign root statements and manifests (in production each on a machine of its own)
    issuer.pem issuer.jwks     the development token issuer
    gateway/                   gateway.toml, its grant key, its credential, audit/
    pools/NAME/                the pool's keys, the state of their generations, and its receipt key
    workers/NAME/              worker.toml, a copy for each of several workers, and settings of models not served now
    trust/                     the chain of root statements, the published manifest, the digests of the models in it
                               (models.json), the routes (routes.json), and the lock for changing any of them
    kms                        the address of the key that wraps the pools' keys, if they are wrapped
    nats/ logs/                nats-server's state; one log per process
    site.json                  the pools, their models, the regions, the addresses of gateway and nats-server
    env                        LACRE_URL and LACRE_TOKEN, for a shell

Everything is created once and then reused; secrets are 0600. Keys, chain and manifest, which several processes may change, are
changed only inside `Site.changing`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tomlkit import TOMLDocument, dumps, parse

from lacre.errors import InvalidMessage, LacreError, SettingsError
from lacre.jose.formats import Format
from lacre.jose.jws import b64u
from lacre.runtime import file_locks, shell
from lacre.trust.chain import ConnectionString, verify
from lacre.trust.manifest import Manifest, ModelEntry, Pool
from lacre.trust.signing import sign_manifest
from lacre.wire.padding import SHAPES
from lacre_fabric.keys import kms, pool_keys
from lacre_fabric.keys.generations import Generations
from lacre_fabric.keys.grant_keys import GrantKeys
from lacre_fabric.keys.kms.wrapping import Keeping, keeping
from lacre_fabric.keys.receipt_keys import ReceiptKeys
from lacre_fabric.keys.root_and_signer import DAY, Authority
from lacre_fabric.keys.secret_files import ed25519, private_folder, read_ed25519, read_secret, write_secret
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.streams import REPLICAS
from lacre_fabric.operate import dev_issuer, model_digests, model_routes, served_models, settings_files
from lacre_fabric.operate.site_file import are_names, member, read_json, time_in
from lacre_fabric.settings import NatsServers, validated
from lacre_fabric.work.model_names import DEFAULT_MODEL

SITE: Final = Format("state folder", "command")  # its version is in site.json
GATEWAY_ID: Final = "g1"
NODE: Final = "n1"
DRAIN: Final = 5  # seconds that running requests have when `lacre up` ends; the supervisor waits longer
MANIFEST_LIFETIME: Final = DAY
KEY_LIFETIME: Final = 7 * DAY  # of a pool key in the manifest; restarts at each publication until the key is rotated
DEVELOPERS: Final = ("lacre:explain", "lacre:explain:lens")  # scopes of the token in `env`: they show more, and change nothing
_LOOPBACK: Final = "http://127.0.0.1:"
CHANGING: Final = 120.0  # seconds to wait for another process that changes the same state

log = structlog.get_logger("lacre.site")


@dataclass(frozen=True, slots=True)
class Site:
    """A state folder. pools: each with its models. regions: the home first. Methods that read raise SettingsError."""

    folder: Path
    pools: Mapping[str, Sequence[str]]
    issuer: str = "lacre"
    replicas: int = 1  # of streams and buckets
    regions: tuple[str, ...] = subjects.ONE_REGION

    @classmethod
    def load(cls, folder: Path) -> Site:
        """The site as `lacre up` saved it, or as an operator with other NATS servers wrote it."""
        path = folder / "site.json"
        content = read_json(path)
        try:
            SITE.check(content)
        except InvalidMessage as exc:
            raise SettingsError(f"{path}: {exc}") from exc
        pools, replicas = content.get("pools"), content.get("replicas", 1)
        if not isinstance(pools, dict) or not all(are_names(models) for models in pools.values()):
            raise SettingsError(f'{path}: pools: write each with its models, as {{"default": ["{DEFAULT_MODEL}"]}}')
        for pool in pools:
            subjects.check_name("pool", pool)
        if replicas not in REPLICAS:
            raise SettingsError(f"{path}: replicas: must be one of {', '.join(map(str, REPLICAS))}")
        regions = content.get("regions", list(subjects.ONE_REGION))
        if not are_names(regions) or not regions or len(set(regions)) != len(regions):
            raise SettingsError(f"{path}: regions: name each once, the home first")
        return cls(folder, pools, replicas=replicas, regions=tuple(map(subjects.check_region, regions)))

    @classmethod
    def load_or_new(cls, folder: Path, pools: Mapping[str, Sequence[str]]) -> Site:
        """The existing site with these pools added; other pools stay. A new one if there is none."""
        if not (folder / "site.json").exists():
            return cls(folder, pools)
        site = cls.load(folder)
        return replace(site, pools={**site.pools, **pools})

    @property
    def servers(self) -> Servers:
        """The NATS servers: an address, or a table like `[nats]` of the settings files, without credentials."""
        said = member(self.folder / "site.json", "nats")
        table = said if isinstance(said, dict) else {"url": said}
        return validated(NatsServers, table, self.folder / "site.json").servers

    @property
    def is_of_one_machine(self) -> bool:
        """Whether its NATS server is the one that `lacre up` starts. True for a state without a site."""
        path = self.folder / "site.json"
        here = not path.exists() or str(member(path, "nats")).startswith("nats://127.0.0.1:")
        return here and self.replicas == 1 and self.regions == subjects.ONE_REGION

    @property
    def base_url(self) -> str:
        """The gateway's current or last URL."""
        return str(member(self.folder / "site.json", "gateway"))

    def save(self, nats_url: str | Sequence[str], base_url: str) -> None:
        """Saves the addresses. Other members stay, above all those for the NATS servers' TLS. Raises SettingsError."""
        path = self.folder / "site.json"
        before = read_json(path) if path.exists() else {}
        nats: object = nats_url
        if isinstance(before.get("nats"), dict):
            nats = {**before["nats"], "url": nats_url}
            validated(NatsServers, nats, path)
        content = {
            **before,
            "pools": self.pools,
            "replicas": self.replicas,
            "regions": self.regions,
            "nats": nats,
            "gateway": base_url,
        }
        write_secret(path, json.dumps(content).encode())

    @property
    def gateway_settings(self) -> Path:
        return self.folder / "gateway" / "gateway.toml"

    def worker_settings(self, pool: str) -> Path:
        return self.folder / "workers" / pool / "worker.toml"

    def node_settings(self, pool: str, node: str) -> Path:
        """For one of several workers of the pool: a copy of `worker_settings`."""
        return self.folder / "workers" / pool / f"worker-{node}.toml"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def create(self) -> None:
        """Creates what is missing, and keeps the rest. Takes the folder away from others. Raises SettingsError."""
        private_folder(self.folder)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.authority.create(time.time())
        for name in ("issuer", "gateway/grant"):
            ed25519(self.folder / f"{name}.pem")
        for pool in self.pools:
            with self.keeping(pool) as kept:
                pool_keys.make_receipt_key(self.receipt_file(pool), kept)
                self._create_keys(pool, kept)
        key_set = dev_issuer.key_set(self._key("issuer"))
        (self.folder / "issuer.jwks").write_text(json.dumps(key_set))

    def _create_keys(self, pool: str, kept: Keeping) -> None:
        """Creates the first keys, or what an interrupted run left of them. The manifest lists them in this order."""
        if not self._generations_file(pool).exists():
            configs = pool_keys.complete(self.keys_folder(pool), pool_keys.DEFAULT_KEMS, kept)
            self.keep_generations(pool, Generations().stage(configs).list_staged(time.time(), 0))

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Holds the lock against all other processes. Raises SettingsError if another one does not finish."""
        deadline = time.monotonic() + CHANGING
        while (lock := file_locks.attempt(self.folder / "trust" / "lock")) is None:
            if time.monotonic() > deadline:
                raise SettingsError(f"another command has been changing {self.folder} for too long: find it and stop it")
            await asyncio.sleep(0.05)
        try:
            yield
        finally:
            lock.release()

    def roles(self, nodes: Sequence[str] = (NODE,)) -> list[Role]:
        """Every role of the fabric, with its credential. nodes: the workers of each pool."""
        return [
            roles.provisioner(self.credential("provisioner")),
            roles.inspector(self.credential("inspector")),
            roles.warden(self.credential("warden")),
            roles.gateway(self.credential(f"gateway-{GATEWAY_ID}"), GATEWAY_ID, tuple(self.pools)),
            *(roles.worker(self.credential(f"worker-{pool}-{node}"), pool, node) for pool in self.pools for node in nodes),
        ]

    def replicated_roles(self) -> list[Role]:
        """Every role for replicated gateways and workers: each kind has one credential per region."""
        pools, regions = tuple(self.pools), self.regions
        workers = [worker_of(pool, region) for pool in pools for region in regions]
        if len(set(workers)) < len(workers):
            raise SettingsError("a pool's name equals another pool's name plus a region: rename one (`a-eu`, or `a` in `eu`)")
        ids = {region: gateway_of(region) for region in regions}
        return [
            roles.provisioner(self.credential("provisioner")),
            roles.inspector(self.credential("inspector")),
            roles.warden(self.credential("warden")),
            *(roles.gateway(self.credential(f"gateway-{name}"), name, pools, regions) for name in ids.values()),
            *(
                roles.worker(self.credential(worker_of(pool, region)), pool, None, region)
                for pool in pools
                for region in regions
            ),
        ]

    def credentials(self) -> dict[str, Credential]:
        """The available credentials by role, as `inspect` takes them; one of several of a kind."""
        mark = {region: "" if region == subjects.DEFAULT_REGION else f"@{region}" for region in self.regions}
        found = {name: self.credential(name) for name in ("provisioner", "inspector")}
        for region in self.regions:
            found[f"gateway{mark[region]}"] = self.credential(f"gateway-{gateway_of(region)}")
            for pool in self.pools:
                names = [worker_of(pool, region)]
                if region == subjects.DEFAULT_REGION:
                    names.insert(0, f"worker-{pool}-{NODE}")
                there = next((name for name in names if self.credential_file(name).exists()), None)
                if there is not None:
                    found[f"worker-{pool}{mark[region]}"] = self.credential(there)
        return found

    def credential(self, name: str) -> Credential:
        return Credential.load_or_new(self.credential_file(name), name)

    def credential_file(self, name: str) -> Path:
        return self.folder / "fabric" / f"{name}.json"

    @property
    def authority(self) -> Authority:
        return Authority(self.folder)

    @property
    def root(self) -> bytes:
        """The public root key that new applications pin."""
        return self.authority.chain().roots[-1]

    def keys_folder(self, pool: str) -> Path:
        """The pool's private keys, which its workers read."""
        return self.folder / "pools" / pool / "keys"

    def receipt_file(self, pool: str) -> Path:
        return self.folder / "pools" / pool / "receipt.pem"

    @property
    def grant_keys(self) -> GrantKeys:
        return GrantKeys(self.folder)

    def receipt_keys(self, pool: str) -> ReceiptKeys:
        return ReceiptKeys(self.keys_folder(pool), self.receipt_file(pool))

    @property
    def models_file(self) -> Path:
        """What the publisher recorded of the models' files: see `model_digests`."""
        return self.folder / "trust" / "models.json"

    @property
    def kms(self) -> str:
        """The address of the key that wraps the pools' keys (see `kms`)."""
        path = self.folder / "kms"
        return path.read_text().strip() if path.exists() else kms.PLAIN

    def check_kms(self, address: str) -> None:
        """Raises SettingsError if it is no address, or if there are keys that are wrapped differently."""
        if address != self.kms:
            if any(self.receipt_file(pool).exists() for pool in self.pools):
                raise SettingsError(
                    f"the keys in {self.folder} are wrapped differently: move them with "
                    f"`lacre keys rewrap --state {shlex.quote(str(self.folder))} --to ADDRESS`, or choose another --state"
                )
            if (service := kms.connect(address)) is not None:  # contacts nothing, but knows whether the address is usable
                service.close()

    def choose_kms(self, address: str) -> None:
        """Sets the address for new keys. Raises as `check_kms`."""
        self.check_kms(address)
        if address != self.kms:
            self.keep_kms(address)

    def keep_kms(self, address: str) -> None:
        write_secret(self.folder / "kms", address.encode())

    def keeping(self, pool: str) -> AbstractContextManager[Keeping]:
        """How the pool's keys are stored. Raises SettingsError."""
        return keeping(self.kms, pool)

    def generations(self, pool: str) -> Generations:
        path = self._generations_file(pool)
        try:
            return Generations.parse(read_secret(path))
        except ValueError as exc:
            raise SettingsError(f"{path} is damaged: remove it to make every key in the folder beside it current") from exc

    def keep_generations(self, pool: str, generations: Generations) -> None:
        write_secret(self._generations_file(pool), generations.encode())

    def _generations_file(self, pool: str) -> Path:
        return self.folder / "pools" / pool / "generations.json"

    def connection_string(self, base_url: str) -> str:
        return str(ConnectionString(base_url, self.root))

    def token(self, subject: str, scopes: Sequence[str] = ()) -> str:
        """A development access token."""
        return dev_issuer.issue(self._key("issuer"), subject, scopes=scopes)

    def write_env(self, base_url: str) -> Path:
        """Writes `env`, which a shell sources to use this site. Mode 0600, because it contains a token."""
        path = self.folder / "env"
        url, token = self.connection_string(base_url), self.token("developer", DEVELOPERS)
        lines = (shell.exported("LACRE_URL", url), shell.exported("LACRE_TOKEN", token), "")
        write_secret(path, "\n".join(lines).encode())
        return path

    def sign_manifest(self, now: float | None = None) -> bytes:
        """Signs and saves the next manifest. Returns the document to publish."""
        now = time.time() if now is None else now
        self.grant_keys.settle(now)
        chain = self.authority.renewed(now)
        manifest = sign_manifest(self._manifest(self._next_version(), now), self.authority.signer())
        document = self.authority.document(manifest, chain, now).encode()
        verify(document, chain.roots[0], now)  # never publish what would not verify from the first root on
        write_secret(self.folder / "trust" / "manifest.json", document)
        return document

    def published(self, now: float) -> None:
        """Call it once the manifest signed as of `now` is on the fabric. Saves the consequences, and destroys replaced signing
        keys.
        """
        self.authority.settle()
        self.grant_keys.published(now)
        write_secret(self.folder / "trust" / "published", str(now).encode())
        for pool in self.pools:
            try:
                before = self.generations(pool)
            except SettingsError:
                continue  # it was published as before: its state has not changed
            after = before.published(now)
            if after != before:
                self.keep_generations(pool, after)

    @property
    def published_at(self) -> float:
        """When the published manifest was signed; 0 if there is none. The next publication mends a damaged file."""
        return time_in(self.folder / "trust" / "published")

    def _next_version(self) -> int:
        """Counts every manifest signed here. The count is saved before use, so that no version is signed twice."""
        path = self.folder / "trust" / "version"
        version = int(path.read_text()) + 1 if path.exists() else 1
        write_secret(path, str(version).encode())
        return version

    def _key(self, name: str) -> Ed25519PrivateKey:
        return read_ed25519(self.folder / f"{name}.pem")

    def _manifest(self, version: int, now: float) -> Manifest:
        pools = {name: self._pool_or_last(name, models, now) for name, models in self.pools.items()}
        gateway_key, *others = self.grant_keys.public()
        routes = model_routes.signed(self.folder, self.pools, self.authority.chain().roots[0], now)
        until = now + MANIFEST_LIFETIME
        return Manifest(self.issuer, version, now, until, gateway_key, pools, routes, tuple(others))

    def _pool_or_last(self, name: str, models: Sequence[str], now: float) -> Pool:
        """The pool. If its files are damaged, its entry in the last manifest, so that the other pools get their next one in
        time.

        Raises SettingsError if there is no last manifest that is still valid.
        """
        try:
            return self._pool(name, models, now)
        except SettingsError as exc:
            try:
                document = (self.folder / "trust" / "manifest.json").read_bytes()
                last = verify(document, self.authority.chain().roots[0], now).manifest.pools[name]
            except (OSError, LacreError, KeyError):
                raise exc from None
            log.error("pool.damaged", pool=name, reason=str(exc), remedy="its last state is published; repair it within a day")
            return last

    def _pool(self, name: str, models: Sequence[str], now: float) -> Pool:
        receipts = self.receipt_keys(name)
        generations = self.generations(name)
        keys, receipt_key = receipts.listed(generations, now, now + KEY_LIFETIME)
        past = receipts.named(generations, now)
        known = model_digests.recorded(self.models_file).get(name, {})
        return Pool({model: known.get(model, ModelEntry()) for model in models}, keys, receipt_key, SHAPES, past)

    def write_settings(
        self,
        nats_url: str,
        port: int,
        models: Mapping[str, Sequence[Mapping[str, object]]],
        nodes: Sequence[str] = (NODE,),
        default: Path | None = None,
    ) -> None:
        """Writes the settings files of gateway and workers. models: for each pool with workers here, the tables of
        `[[models]]`. default: the file of the default model; None: the shipped one.

        Only addresses, keys and the list of models are rewritten. Settings by a person or by `lacre worker tune` stay. nodes:
        the workers of each pool. If there are several, each gets a copy of the pool's settings with its share of the
        processors.
        """
        base_url = f"http://127.0.0.1:{port}"
        self._write_gateway(nats_url, port, base_url)
        for pool, tables in models.items():
            document = self._write_worker(nats_url, pool, tables, default)
            for node in nodes if len(nodes) > 1 else ():
                self._copy_worker(pool, node, document, max(1, len(os.sched_getaffinity(0)) // len(nodes)))
        self.save(nats_url, base_url)

    def _write_gateway(self, nats_url: str, port: int, base_url: str) -> None:
        key_set = str(self.folder / "issuer.jwks")
        document, new = settings_files.opened(self.gateway_settings)
        values: dict[str, object] = {
            "gateway": GATEWAY_ID,
            "trust": b64u(self.root),
            "listen": {"port": port},
            "nats": {"url": nats_url, "credentials": str(self.credential_file(f"gateway-{GATEWAY_ID}"))},
        }
        if str(document.get("public_url", _LOOPBACK)).startswith(_LOOPBACK):  # a person set any other value
            values["public_url"] = base_url
        settings_files.update(document, values)
        if new:
            issuer = {"issuer": dev_issuer.ISSUER, "audience": dev_issuer.AUDIENCE, "algorithms": ["EdDSA"], "jwks": key_set}
            files = {"signing_key": "grant.pem", "audit": "audit", "memory": "manifests"}
            settings_files.update(document, {**files, "listen": {"host": "127.0.0.1", "drain": DRAIN}, "issuers": [issuer]})
        settings_files.tables(self.gateway_settings, document, "issuers")  # raises
        for issuer in document.get("issuers", []):
            if issuer.get("issuer") == dev_issuer.ISSUER and isinstance(issuer.get("jwks"), str):
                settings_files.update(issuer, {"jwks": key_set})  # the folder may have moved
        settings_files.save(self.gateway_settings, document)

    def _write_worker(
        self, nats_url: str, pool: str, tables: Sequence[Mapping[str, object]], default: Path | None
    ) -> TOMLDocument:
        path = self.worker_settings(pool)
        document, new = settings_files.opened(path)
        if not new and not {"models", "upstream"} & set(document):
            raise SettingsError(f"{path} is damaged: it has no [[models]]. Correct it, or remove it (its settings are lost)")
        values = {
            "pool": pool,
            "node": NODE,
            "trust": b64u(self.root),
            "keys": str(self.keys_folder(pool)),
            "receipt_key": str(self.receipt_file(pool)),
            "kms": self.kms,
            "nats": {"url": nats_url, "credentials": str(self.credential_file(f"worker-{pool}-{NODE}"))},
        }
        if default is None:
            document.pop("default_model", None)
        settings_files.update(document, values if default is None else {**values, "default_model": str(default)})
        if new:
            settings_files.update(document, {"drain": DRAIN, "memory": "manifests", "health": "health"})
        if "upstream" not in document:
            served_models.keep(path, document, tables)
        settings_files.save(path, document)
        return document

    def _copy_worker(self, pool: str, node: str, document: TOMLDocument, threads: int) -> None:
        """The settings of one of several workers. threads: for each model without its own value."""
        copy = parse(f"# Copied from {self.worker_settings(pool).name} at each start: edit that file.\n" + dumps(document))
        own = {"node": node, "nats": {"credentials": str(self.credential_file(f"worker-{pool}-{node}"))}}
        settings_files.update(copy, own | {name: f"{copy[name]}-{node}" for name in ("memory", "health") if name in copy})
        for model in copy.get("models", []):
            model.setdefault("threads", threads)
        settings_files.save(self.node_settings(pool, node), copy)


def gateway_of(region: str) -> str:
    """The name of a region's gateways on the fabric."""
    return GATEWAY_ID if region == subjects.DEFAULT_REGION else region


def worker_of(pool: str, region: str) -> str:
    """The credential that all of a pool's workers in a region share."""
    return f"worker-{pool}" if region == subjects.DEFAULT_REGION else f"worker-{pool}-{region}"
