"""The rendered pods, played as processes: what the docs have an operator prepare is enough, and a sealed chat is answered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import pytest
import yaml

from chart.playing import Machine, certificate
from chart.rendering import NAMESPACE, NPM, Pod, Rendered, template
from lacre_backend.models import find
from lacre_fabric.site import Site
from lacre_fabric.tokens import AUDIENCE, ISSUER

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NPM is None, reason="npm, which Helm is fetched with, is not installed")]
NATS = f"r-lacre-nats.{NAMESPACE}.svc"
POOL = "default"
MODEL = "smollm2-135m"
# As docs/kubernetes.md has it.
ARCHIVED = ("signer.pem", "issuer.pem", "gateway/grant.pem", "pools", "trust", "fabric/provisioner.json")


def lacre(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "lacre", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Prepared:
    """The operator's own machine, and what is brought from it into Secrets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "site"
        self.state.mkdir()
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
        }

    def read(self, name: str) -> bytes:
        return (self.state / name).read_bytes()

    def mounted(self) -> dict[str, Path]:
        """As a kubelet would: files that nobody can write."""
        found = {}
        for secret, files in self.secrets.items():
            found[secret] = self.folder / secret
            found[secret].mkdir()
            for name, content in files.items():
                (found[secret] / name).write_bytes(content)
                (found[secret] / name).chmod(0o400)
        for name in ("lacre-gateway-tls", "lacre-nats-tls"):
            certificate(self.folder / name)
            found[name] = self.folder / name
        return found

    @cached_property
    def chart(self) -> Rendered:
        return self.rendered(rotate_hours=24)

    def rendered(self, rotate_hours: float) -> Rendered:
        keys = json.loads((self.state / "issuer.jwks").read_text())
        values = {
            "trust": self.root,
            "issuers": [{"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ["EdDSA"], "jwks": keys}],
            "longestStream": 20,
            "gateway": {"drainDelay": 0},
            "nats": {"replicas": 1},
            "signer": {"rotateHours": rotate_hours},
            "poolKeys": {"volume": {"enabled": True}},
        }
        file = self.folder / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        return Rendered(tuple(each for each in yaml.safe_load_all(template(file)) if each), values)

    def machine(self) -> Machine:
        models = self.folder / "models"
        models.mkdir()
        (models / f"{MODEL}.gguf").symlink_to(find().path)
        return Machine(self.folder, self.chart, self.mounted(), {"lacre-models": models}, (NATS,))


@contextmanager
def running(machine: Machine, pod: Pod) -> Iterator[None]:
    """From when it is ready, until it has ended by SIGTERM, as pods do."""
    process = machine.start(pod, pod.spec["containers"][0])
    try:
        machine.await_probe(pod, "startupProbe", process)
        machine.await_probe(pod, "readinessProbe", process)
        assert machine.passes(pod, pod.spec["containers"][0]["livenessProbe"])
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, 1) if pod.component == "nats" else process.wait(20) == 0, machine.log(pod)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


def ask(prepared: Prepared, machine: Machine) -> str:
    """What an application gets that pins the root, and trusts the authority of the gateway's certificate."""
    environment = os.environ | {
        "LACRE_URL": f"lacre://localhost:{machine.port(8321)}?trust={prepared.root}",
        "LACRE_TOKEN": Site.load(prepared.state).token("somebody"),
        "SSL_CERT_FILE": str(prepared.folder / "lacre-gateway-tls" / "ca.crt"),
        "XDG_STATE_HOME": str(prepared.folder),
    }
    command = [sys.executable, "-m", "lacre", "ask", "--max-tokens", "8", "Name three seas."]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in prepared.folder.glob("*.log"))
    return done.stdout


def test_a_sealed_chat_through_the_rendered_pods(prepared: Prepared) -> None:
    """And another one after the signer's next run, which makes new pool keys; the worker has them from their volume."""
    machine, chart = prepared.machine(), prepared.chart
    nats, gateway, worker = (chart.of_component(name)[0] for name in ("nats", "gateway", "worker"))
    (job,) = (pod for pod in chart.of_component("signer") if pod.owner["kind"] == "Job")
    keys, version = prepared.folder / f"r-lacre-keys-{POOL}", prepared.folder / "r-lacre-signer" / "trust" / "version"
    with ExitStack() as stack:
        stack.enter_context(running(machine, nats))
        machine.run(job)
        assert ({path.name for path in keys.iterdir()}, version.read_text()) == ({"1.key", "2.key"}, "1")
        stack.enter_context(running(machine, worker))
        stack.enter_context(running(machine, gateway))
        assert len(ask(prepared, machine).split()) > 2
        often = prepared.rendered(rotate_hours=0.0001).of_component("signer")
        machine.run(next(pod for pod in often if pod.owner["kind"] == "CronJob"))
        assert ({path.name for path in keys.iterdir()}, version.read_text()) == ({f"{n}.key" for n in (1, 2, 3, 4)}, "3")
        assert len(ask(prepared, machine).split()) > 2
    assert "key.taken_up" in machine.log(worker).partition("worker.ready")[2]
    assert (prepared.folder / "r-lacre-gateway-audit" / "audit" / "checkpoint").exists()
