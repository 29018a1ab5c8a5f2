"""The rendered pods, played as processes: what the docs have an operator prepare is enough, and a sealed chat is answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from chart.playing import Machine
from chart.preparing import MODEL, NATS, POOL, Prepared
from chart.rendering import Pod
from lacre_backend.models.gguf import find
from lacre_fabric.operate.site import Site
from lacre_gateway.settings import shipped
from parts import tls_issuer
from parts.certificates import Ca
from parts.issuer import AUDIENCE

pytestmark = pytest.mark.slow


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


def machine_of(
    prepared: Prepared, system: Path | None = None, config_maps: Mapping[str, Mapping[str, str]] | None = None
) -> Machine:
    models = prepared.folder / "models"
    models.mkdir()
    (models / f"{MODEL}.gguf").symlink_to(find().path)
    claims = {"lacre-models": models}
    return Machine(prepared.folder, prepared.chart, prepared.mounted(), claims, (NATS,), config_maps or {}, system)


def ask(prepared: Prepared, machine: Machine, token: str | None = None) -> str:
    """What an application gets that pins the root, and trusts the authority of the gateway's certificate."""
    environment = os.environ | {
        "LACRE_URL": f"lacre://localhost:{machine.port(8321)}?trust={prepared.root}",
        "LACRE_TOKEN": token or Site.load(prepared.state).token("somebody"),
        "SSL_CERT_FILE": str(prepared.folder / "lacre-gateway-tls" / "ca.crt"),
        "XDG_STATE_HOME": str(prepared.folder),
    }
    command = [sys.executable, "-m", "lacre", "ask", "--max-tokens", "8", "Name three seas."]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in prepared.folder.glob("*.log"))
    return done.stdout


def test_a_sealed_chat_through_the_rendered_pods(prepared: Prepared) -> None:
    """And another one after the signer's next run, which makes new pool keys; the worker has them from their volume."""
    machine, chart = machine_of(prepared), prepared.chart
    nats, gateway, worker = (chart.of_component(name)[0] for name in ("nats", "gateway", "worker"))
    (job,) = (pod for pod in chart.of_component("signer") if pod.owner["kind"] == "Job")
    keys, version = prepared.folder / f"r-lacre-keys-{POOL}", prepared.folder / "r-lacre-signer" / "trust" / "version"
    with ExitStack() as stack:
        stack.enter_context(running(machine, nats))
        machine.run(job)
        assert ({path.name for path in keys.iterdir()}, version.read_text()) == ({"1.key", "2.key"}, "1")
        stack.enter_context(running(machine, worker))
        stack.enter_context(running(machine, gateway))
        assert ask(prepared, machine).strip()  # the model's words are its own affair
        often = prepared.rendered(rotate_hours=0.0001).of_component("signer")
        machine.run(next(pod for pod in often if pod.owner["kind"] == "CronJob"))
        assert ({path.name for path in keys.iterdir()}, version.read_text()) == ({f"{n}.key" for n in (1, 2, 3, 4)}, "3")
        assert ask(prepared, machine).strip()
    assert "key.taken_up" in machine.log(worker).partition("worker.ready")[2]
    assert (prepared.folder / "r-lacre-gateway-audit" / "audit" / "checkpoint").exists()


def flattened(rules: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """A rule set as a ConfigMap, whose keys have no folders; and the values that name its cases."""
    entries = {path.name: path.read_text() for path in rules.iterdir() if path.is_file()}
    cases: dict[str, list[str]] = {}
    for path in sorted(rules.glob("cases/*/*.json")):
        key = f"{path.parent.name.lower()}-{path.name}"
        entries[key] = path.read_text()
        cases.setdefault(path.parent.name.lower(), []).append(key)
    return entries, cases


def test_public_issuers_are_trusted_beside_a_private_authority_of_nats(tmp_path: Path) -> None:
    """Three authorities: NATS' own, a public one of the system's, a company's of one issuer. Each counts for its own alone."""
    public, company = Ca(tmp_path / "public", "public"), Ca(tmp_path / "company", "company")
    rules, cases = flattened(shipped())
    with ExitStack() as stack:
        login = stack.enter_context(tls_issuer.running(public, tmp_path / "login"))
        sso = stack.enter_context(tls_issuer.running(company, tmp_path / "sso"))
        stray = stack.enter_context(tls_issuer.running(company, tmp_path / "stray"))
        common = {"audience": AUDIENCE, "algorithms": ["EdDSA"]}
        values = {
            "issuers": [
                {"issuer": login.url, **common},
                {"issuer": sso.url, "ca": "/etc/lacre/issuers/company.pem", **common},
                {"issuer": stray.url, **common},
            ],
            "issuerAuthorities": {"company": company.file.read_text()},
            "gateway": {"policies": "ours", "policyCases": cases},
        }
        prepared = Prepared(tmp_path / "operator", values)
        machine = machine_of(prepared, public.file, {"ours": rules})
        nats, gateway, worker = (prepared.chart.of_component(name)[0] for name in ("nats", "gateway", "worker"))
        (job,) = (pod for pod in prepared.chart.of_component("signer") if pod.owner["kind"] == "Job")
        stack.enter_context(running(machine, nats))
        machine.run(job)
        stack.enter_context(running(machine, worker))
        stack.enter_context(running(machine, gateway))
        for issuer in (login, sso):
            assert ask(prepared, machine, issuer.token(sub="somebody")).strip()
            assert issuer.asked[:2] == [tls_issuer.DISCOVERY, "/keys"]
        refused = f"{stray.url}{tls_issuer.DISCOVERY} cannot be reached: its certificate is not signed by a trusted CA"
        assert refused in machine.log(gateway)
        assert stray.asked == []
