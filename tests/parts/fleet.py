"""Gateways, nats-server and a worker, each a process of its own that a test may kill; limits by a plans file of the test's."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lacre.wire.bhttp import Request, encode_request
from lacre.wire.header import MEDIA_TYPE_REQUEST, Aead, Kdf, Kem, KeyConfig, Suite
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats import roles
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import Site
from lacre_fabric.work.contract import FabricUnavailable
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.policy.rules import shipped
from parts.cluster import GatewayProcess, own_issuer
from parts.fleet_worker import MODEL, POOL

READY = 240.0  # seconds; three processes that import at once, on a machine that has other things to do
SUITE = Suite(Kem.X25519, Kdf.HKDF_SHA256, Aead.AES_256_GCM)


class Fleet:
    """`start` it, and `stop` it. plans, limits: text of the plans file and of the gateways' table `[limits]`."""

    def __init__(self, folder: Path, names: Sequence[str], plans: str, limits: str) -> None:
        self.site = Site(folder / "state", {POOL: (MODEL,)})
        self.site.create()
        self._server = NatsServer(self.site.folder / "nats", free_port())
        self._policies = folder / "policies"
        shutil.copytree(shipped(), self._policies)
        (self._policies / PLANS_FILE).write_text(plans)
        more = f"{own_issuer(self.site)}\n[limits]\n{limits}"
        url = self._server.url
        self.gateways = {name: GatewayProcess.configured(self.site, name, [url], self._policies, more) for name in names}
        self.nats: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self._config = self._key()

    async def start(self, free: int, slots: int) -> None:
        """free: calls that the worker does not hold."""
        others = [name for name in self.gateways if name != "g1"]
        more = [roles.gateway(self.site.credential(f"gateway-{name}"), name, (POOL,)) for name in others]
        self._server.configure([*self.site.roles(), *more])
        self.start_nats()
        self.site.save(self._server.url, self.gateways["g1"].base_url)
        connection = await Connection.open(self._server.url, self.site.credential("provisioner"))
        await provision(connection, self.site.pools)
        await publish(self.site, connection)
        await connection.close()
        self._start_worker(free, slots)
        for gateway in self.gateways.values():
            gateway.start()
        await self.ready()

    def _start_worker(self, free: int, slots: int) -> None:
        arguments = [str(self.site.folder), self._server.url, str(free), str(slots)]
        command = leashed([*PYTHON, str(Path(__file__).with_name("fleet_worker.py")), *arguments])
        with self.site.log("worker").open("wb") as log:
            self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def start_nats(self) -> None:
        self.nats = self._server.start(self.site.log("nats"))

    async def restart_nats(self) -> None:
        """Kills it; what was in its files is there again, and its queues, which were in memory, are made anew."""
        assert self.nats is not None
        self.nats.kill()
        self.nats.wait()
        await asyncio.sleep(0.3)
        self.start_nats()
        async with asyncio.timeout(60):
            while not await self._provisioned():
                await asyncio.sleep(0.1)

    async def _provisioned(self) -> bool:
        """A server that has just come up, with everybody at its door, may refuse at first."""
        try:
            connection = await Connection.open(self._server.url, self.site.credential("provisioner"))
        except FabricUnavailable:
            return False
        try:
            await provision(connection, self.site.pools)
        except FabricUnavailable:
            return False
        finally:
            await connection.close()
        return True

    async def ready(self) -> None:
        async with asyncio.timeout(READY):
            await asyncio.gather(*map(_ready, self.gateways.values()))

    def let_go(self) -> None:
        """The worker holds nothing from now on."""
        assert self.worker is not None and self.worker.stdin is not None
        self.worker.stdin.write(b"go\n")
        self.worker.stdin.flush()

    def counts(self) -> tuple[int, int, int]:
        """Calls that run, that were answered, and that ran at once at most."""
        lines = [line for line in self.site.log("worker").read_text().splitlines() if line.replace(" ", "").isdigit()]
        running, answered, most = map(int, lines[-1].split()) if lines else (0, 0, 0)
        return running, answered, most

    async def stop_gateways(self) -> None:
        """In order: what they did not use of their leases is given back."""
        for gateway in self.gateways.values():
            gateway.process.terminate()
        for gateway in self.gateways.values():
            await asyncio.to_thread(gateway.process.wait, 60)

    def stop(self) -> None:
        """Also of a fleet that did not come up."""
        for gateway in self.gateways.values():
            if hasattr(gateway, "process"):
                gateway.stop()
        for process in (self.worker, self.nats):
            if process is not None:
                process.kill()
                process.wait()
        if self.worker is not None and self.worker.stdin is not None:
            self.worker.stdin.close()

    def audit(self, name: str) -> Path:
        return self.site.folder / "gateway" / f"audit-{name}"

    def token(self, subject: str, tenant: str) -> str:
        return dev_issuer.issue(read_ed25519(self.site.folder / "issuer.pem"), subject, tenant=tenant)

    def seal(self) -> tuple[bytes, ResponseOpener]:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        headers = (("content-type", "application/json"), ("date", date))
        request = Request("POST", "https", "lacre.invalid", "/v1/chat/completions", headers, b"{}")
        body, _, opener = seal_request(self._config, encode_request(request), SUITE)
        return body, opener

    @staticmethod
    def headers(token: str, max_tokens: int) -> dict[str, str]:
        return {
            "authorization": f"Bearer {token}", "content-type": MEDIA_TYPE_REQUEST, "lacre-pool": POOL, "lacre-model": MODEL,
            "lacre-action": "chat", "lacre-max-tokens": str(max_tokens), "lacre-shape": "none",
        }  # fmt: skip

    def _key(self) -> KeyConfig:
        keys = self.site.generations(POOL).pool_keys(time.time(), time.time() + 600)
        return next(key.config for key in keys if key.config.kem is Kem.X25519)


async def _ready(gateway: GatewayProcess) -> None:
    """For as long as it takes."""
    while True:
        with contextlib.suppress(TimeoutError):
            return await gateway.ready()
