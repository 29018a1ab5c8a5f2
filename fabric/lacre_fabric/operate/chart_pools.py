"""The pools for the Helm chart: values, and the commands that bring a new or removed pool to a cluster, in their order."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Final

from lacre.runtime.json_objects import object_in
from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.operate.pool_upstreams import of_site
from lacre_fabric.operate.site import Site, worker_of

_ARCHIVED: Final = "signer.pem issuer.pem gateway/grant.pem pools trust fabric/provisioner.json"


def values_file(site: Site) -> Path:
    return site.folder / "chart" / "pools.yaml"


def write_values(site: Site, changed: str = "") -> None:
    """Writes `chart/pools.yaml`: every pool of the site. JSON is YAML too. changed: a pool whose values change.

    Other pools keep what the file says. A pool that it did not name gets no values, because an operator's own file has them.
    Raises SettingsError.
    """
    path = values_file(site)
    before = (object_in(path.read_bytes()) or {}).get("pools") if path.exists() else None
    pools = {pool: _kept(before, pool) for pool in site.pools}
    if changed:
        upstream, models = of_site(site.folder).get(changed), site.pools[changed]
        pools[changed] = (
            {"models": [{"name": model, "path": f"/models/{model}.gguf"} for model in models]}
            if upstream is None
            else {"upstream": upstream.table(models)}
        )
    write_secret(path, json.dumps({"pools": pools}, indent=2).encode() + b"\n")


def _kept(before: object, pool: str) -> object:
    found = before.get(pool) if isinstance(before, dict) else None
    return found if isinstance(found, dict) else {}


def added(site: Site, pool: str, accounts: Path) -> list[str]:
    """The commands for a new pool: the servers know it before the manifest names it."""
    keys, credential = site.keys_folder(pool), site.credential_file(worker_of(pool, site.regions[0]))
    return [
        *_to_servers(accounts),
        _secret(f"lacre-pool-{pool}", **{"receipt.pem": site.receipt_file(pool), "nats.json": credential}),
        f"{_create(f'lacre-pool-{pool}-keys')} --from-file={_quoted(keys)} {_APPLY}",
        *_to_signer(site),
        _upgrade(site),
    ]


def removed(site: Site, pool: str, accounts: Path) -> list[str]:
    """The commands for a pool that goes: the manifest no longer names it before the servers forget it.

    The signer destroys its copy of the keys once neither its archive nor the values have the pool. Claims outlive an upgrade.
    """
    left = f"secret/lacre-pool-{pool} secret/lacre-pool-{pool}-keys pvc/lacre-keys-{pool}"
    return [
        *_to_signer(site),
        _upgrade(site),
        *_to_servers(accounts),
        f"kubectl -n lacre delete {left} --ignore-not-found",
    ]


_APPLY: Final = "--dry-run=client -o yaml | kubectl apply -f -"


def _create(name: str) -> str:
    return f"kubectl -n lacre create secret generic {name}"


def _secret(name: str, **files: Path) -> str:
    entries = " ".join(f"--from-file={entry}={_quoted(path)}" for entry, path in files.items())
    return f"{_create(name)} {entries} {_APPLY}"


def _to_servers(accounts: Path) -> list[str]:
    return [
        _secret("lacre-nats", **{"accounts.json": accounts}),
        "kubectl -n lacre rollout restart statefulset/lacre-nats",
        "kubectl -n lacre rollout status statefulset/lacre-nats --timeout=15m",
    ]


def _to_signer(site: Site) -> list[str]:
    """The archive has private keys: nobody else can read it, and it goes once the cluster has it."""
    archive = site.folder / "state.tar"
    name = _quoted(archive)
    return [
        f"(umask 077; rm -f {name}; tar -cf {name} -C {_quoted(site.folder)} {_ARCHIVED})",  # an old file would keep its mode
        _secret("lacre-signer", **{"state.tar": archive}),
        f"rm -f {name}",
    ]


def _upgrade(site: Site) -> str:
    return f"helm upgrade lacre deploy/helm/lacre -n lacre -f {_quoted(values_file(site))} -f mine.yaml --wait"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
