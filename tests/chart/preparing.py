"""What docs/kubernetes.md has an operator prepare: a site's state, the Secrets that come from it, and the chart's values."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from chart.rendering import NAMESPACE, Object, Rendered, merged, template
from lacre_fabric.operate.dev_issuer import AUDIENCE, ISSUER
from parts import strict_yaml
from parts.certificates import Ca

NATS = f"r-lacre-nats.{NAMESPACE}.svc"
POOL = "default"
MODEL = "smollm2-135m"
# As docs/kubernetes.md has it.
ARCHIVED = ("signer.pem", "issuer.pem", "gateway/grant.pem", "pools", "trust", "fabric/provisioner.json")


def lacre(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "lacre", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def certificate(*hosts: str) -> dict[str, bytes]:
    """A server's, and its authority's: tls.crt, tls.key and ca.crt."""
    with TemporaryDirectory() as name:
        authority = Ca(Path(name))
        pair = authority.issue(Path(name), "server", hosts=hosts)
        files = {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": authority.file}
        return {file: path.read_bytes() for file, path in files.items()}


def mount(folder: Path, entries: Mapping[str, bytes]) -> None:
    """As a kubelet would: files that nobody can write."""
    folder.mkdir(parents=True)
    for name, content in entries.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o400)


class Prepared:
    """The operator's own machine, and what is brought from it into Secrets. values: more for the chart."""

    def __init__(self, folder: Path, values: Object | None = None) -> None:
        self.folder = folder
        self._values = values or {}
        self.state = folder / "site"
        self.state.mkdir(parents=True)
        site = {"pools": {POOL: [MODEL]}, "replicas": 1, "nats": f"tls://{NATS}:4222", "gateway": "https://lacre.example.com"}
        (self.state / "site.json").write_text(json.dumps(site))
        self.root = lacre("keys", "init", "--state", str(self.state), "--pool", POOL).split()[-1]
        accounts = lacre("fabric", "accounts", "--state", str(self.state))
        with tarfile.open(folder / "state.tar", "w") as archive:
            for name in ARCHIVED:
                archive.add(self.state / name, name)
        self.secrets = {
            "lacre-gateway": {"grant.pem": self.read("gateway/grant.pem"), "nats.json": self.read("fabric/gateway-g1.json")},
            f"lacre-pool-{POOL}": {
                "receipt.pem": self.read(f"pools/{POOL}/receipt.pem"),
                "nats.json": self.read(f"fabric/worker-{POOL}.json"),
            },
            "lacre-signer": {"state.tar": (folder / "state.tar").read_bytes()},
            "lacre-nats": {"accounts.json": accounts.encode()},
            "lacre-gateway-tls": certificate("localhost"),
            "lacre-nats-tls": certificate(NATS, "localhost"),
        }

    def read(self, name: str) -> bytes:
        return (self.state / name).read_bytes()

    def mounted(self) -> dict[str, Path]:
        for secret, entries in self.secrets.items():
            mount(self.folder / secret, entries)
        return {secret: self.folder / secret for secret in self.secrets}

    @cached_property
    def chart(self) -> Rendered:
        return self.rendered(rotate_hours=24)

    def rendered(self, rotate_hours: float) -> Rendered:
        keys = json.loads((self.state / "issuer.jwks").read_text())
        own: Object = {
            "trust": self.root,
            "issuers": [{"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ["EdDSA"], "jwks": keys}],
            "pools": {POOL: {}},
            "longestStream": 20,
            "gateway": {"drainDelay": 0},
            "nats": {"replicas": 1},
            "signer": {"rotateHours": rotate_hours},
            "poolKeys": {"volume": {"enabled": True}},
        }
        values = merged(own, self._values)
        file = self.folder / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        return Rendered(tuple(strict_yaml.load_all(template(file))), values)
