"""The rendered pods, played as processes: what the docs have an operator prepare is enough, and a sealed chat is answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from chart.playing import Machine
from chart.preparing import MODEL, NATS, POOL, Prepared
from chart.rendering import Pod
from lacre_backend.models.gguf import find
from lacre_fabric.operate.site import Site

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


def machine_of(prepared: Prepared) -> Machine:
    models = prepared.folder / "models"
    models.mkdir()
    (models / f"{MODEL}.gguf").symlink_to(find().path)
    return Machine(prepared.folder, prepared.chart, prepared.mounted(), {"lacre-models": models}, (NATS,))


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
