"""A whole gateway for `bench/gateway.py`, everything on: signed tokens, policy, limits, audit log on disk, grants, receipts.

Three processes run on loopback: nats-server, the gateway (`python -m lacre_gateway`, one process), and `bench/consumer.py` in
place of workers. They have the credentials, accounts and signed manifest that `lacre up` would give them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.consumer import Task as Answers
from bench.load import Task as Load
from lacre.wire.header import MEDIA_TYPE_REQUEST, Aead, Kdf, Kem, Suite
from lacre.wire.ohttp import seal_request
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision, publish_manifest
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.site import NODE, Site
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.settings import shipped

ROOT = Path(__file__).resolve().parent.parent
POOL, MODEL = "default", "smollm2-135m"
MODELS = (MODEL, "smollm2-360m", "smollm2-1.7b")
SUBJECTS = 64
MAX_TOKENS = 256
# How many sizes of bodies take turns, by the nominal size that they are spread around. The counts are primes that divide
# neither the number of subjects nor that of models, so no two requests in thousands are alike.
SIZES = ((2**15, 61), (2**19, 7), (2**23, 5))
SPREAD = 0.15  # of the nominal size, at most, to each side
_FRAMING = 40  # bytes at least: header, tags and lengths of chunks
REOPEN = 10  # one request of so many ends its connection
START = 30.0  # seconds
# Every limit there is, counted for each request and reached by none.
LIMITS = """
[limits]
requests_in_flight = 4096
concurrent_per_subject = 4096
"""
LISTEN = "connections_per_address = 10000\n"  # all that measure are at one
PLANS = (
    """
currency = "USD"
default_plan = "bench"
"""
    + "".join(
        f"""
[plans.bench.{scope}]
requests_per_minute = 10000000
tokens_per_minute = 100000000000
tokens_per_day = 1000000000000
money_per_month = "1000000.00"
concurrent_streams = 10000
"""
        for scope in ("user", "tenant", "everyone")
    )
    + """
[prices."*"]
prompt = "0.10"
cached = "0.01"
completion = "0.40"
"""
)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """cpu: seconds of all threads, user and system. rss: bytes."""

    cpu: float
    rss: int


def usage(pid: int) -> Usage:
    """Of the process and its children: of all processes of a gateway."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [_usage(pid), *(_usage(int(child)) for child in children)]
    return Usage(sum(each.cpu for each in found), sum(each.rss for each in found))


def _usage(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


class Stand:
    """site: keys, pools and settings. port, admin_port: of the gateway. process: the gateway's. nats: the message server's."""

    def __init__(
        self, site: Site, port: int, admin_port: int, nats_port: int, process: subprocess.Popen[bytes],
        nats: subprocess.Popen[bytes], subjects: int,
    ) -> None:  # fmt: skip
        self.site, self.port, self.admin_port, self.process, self.nats = site, port, admin_port, process, nats
        self._nats_port = nats_port
        self._tokens = [site.token(f"caller-{number}@example.com") for number in range(subjects)]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self._nats_port}"

    @contextmanager
    def answering(self, records: int, *, hold: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """While it runs, each request is answered with so many records."""
        task = Answers(
            port=self._nats_port,
            credential=str(self.site.credential_file(f"worker-{POOL}-{NODE}")),
            receipt_key=str(self.site.folder / "pools" / POOL / "receipt.pem"),
            keys=str(self.site.folder / "pools" / POOL / "keys"),
            pool=POOL, models=MODELS, node=NODE, records=records, hold=hold,
        )  # fmt: skip
        command = [sys.executable, "-m", "bench.consumer", json.dumps(asdict(task))]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        with ended(process):
            assert process.stdout is not None
            process.stdout.readline()  # it has said that it is there
            time.sleep(1.5)  # and what another one before it had asked for is over
            yield process

    def load(
        self, size: int, connections: int, *, kem: Kem = Kem.X25519, models: Sequence[str] = MODELS, reopen: int = REOPEN,
        **limits: Any,
    ) -> Load:  # fmt: skip
        """Sealed bodies of about `size` bytes, each under an `enc` of its own, by all subjects and for all models in turns."""
        start = "POST /v1/sealed HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer"
        heads = []
        for number in range(math.lcm(len(self._tokens), len(models))):
            fields = (
                f"content-type: {MEDIA_TYPE_REQUEST}\r\nlacre-pool: {POOL}\r\nlacre-model: {models[number % len(models)]}\r\n"
                f"lacre-action: chat\r\nlacre-max-tokens: {MAX_TOKENS}\r\nlacre-shape: none\r\n"
            )
            heads.append(f"{start} {self._tokens[number % len(self._tokens)]}\r\n{fields}")
        bodies = [sealed(self.site, each, kem) for each in sizes(size)]
        parts = [(_b64(before), _b64(after)) for before, after in bodies]
        return Load(self.port, connections, heads, parts, kem.n_enc, reopen, **limits)


def sizes(nominal: int) -> list[int]:
    """Different sizes whose mean is the nominal one."""
    many = next(count for limit, count in SIZES if nominal <= limit)
    return [nominal + round(nominal * SPREAD * (2 * number / (many - 1) - 1)) for number in range(many)]


def sealed(site: Site, size: int, kem: Kem = Kem.X25519) -> tuple[bytes, bytes]:
    """The bytes before `enc` and after it in a sealed request of `size` bytes, or some more: chunks leave a few sizes out."""
    configs = [key.config for key in site.generations(POOL).pool_keys(time.time(), time.time() + 60)]
    config = next(config for config in configs if config.kem is kem)
    suite = Suite(kem, Kdf.HKDF_SHA256, Aead.AES_256_GCM)
    length = size - kem.n_enc - _FRAMING
    while len(body := bytes(seal_request(config, bytes(length), suite)[0])) < size:
        length += size - len(body)
    return body[:7], body[7 + kem.n_enc :]


@contextmanager
def begun_load(task: Load) -> Iterator[dict[str, Any]]:
    """The figures of one load, made by a process of its own; what it holds, it holds until this is left."""
    command = [sys.executable, "-m", "bench.load"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    with ended(process):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the load did not come to its end: see above")
        yield dict(json.loads(line))


def run_load(task: Load) -> dict[str, Any]:
    with begun_load(task) as figures:
        return figures


@contextmanager
def stand(folder: Path, *, subjects: int = SUBJECTS, processes: int = 1, python: Path | None = None) -> Iterator[Stand]:
    """folder: where its state goes, the audit log too. python: runs the gateway in place of this one; it needs the
    packages of `requirements/gateway.lock`, and takes Lacre's from here.
    """
    site = Site(folder / "site", {POOL: MODELS})
    site.create()
    port, admin_port = free_port(), free_port()
    with ExitStack() as stack:
        server = NatsServer(site.folder / "nats", free_port())
        (site.folder / "nats").mkdir(exist_ok=True)
        alone = site.roles()
        known = {role.credential.name for role in alone}
        crowd = (role for role in site.replicated_roles() if role.credential.name not in known)
        server.configure([*alone, *crowd])  # a crowd of workers shares one credential
        nats = stack.enter_context(ended(server.start(site.log("nats"))))
        asyncio.run(_publish(site, server.url))
        site.write_settings(server.url, port, {POOL: [{"name": name} for name in MODELS]})
        policies = folder / "policies"
        shutil.copytree(shipped(), policies)
        (policies / PLANS_FILE).write_text(PLANS)
        text = site.gateway_settings.read_text().replace("[listen]\n", f"[listen]\n{LISTEN}")
        added = f"{LIMITS}\n[admin]\nport = {admin_port}\n"
        site.gateway_settings.write_text(f"policies = {json.dumps(str(policies))}\nprocesses = {processes}\n{text}{added}")
        log = stack.enter_context(site.log("gateway").open("wb"))
        command = [str(python or sys.executable), "-m", "lacre_gateway", "--settings", str(site.gateway_settings)]
        sources = {"PYTHONPATH": os.pathsep.join(str(ROOT / package) for package in ("sdk", "fabric", "gateway"))}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (sources if python else {}))
        stack.enter_context(ended(process))
        _await_ready(port, process, site)
        yield Stand(site, port, admin_port, server.port, process, nats, subjects)


async def _publish(site: Site, url: str) -> None:
    connection = await Connection.open(url, site.credential("provisioner"))
    await provision(connection, site.pools)
    await publish_manifest(connection, site.sign_manifest())
    await connection.close()


def _await_ready(port: int, process: subprocess.Popen[bytes], site: Site) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"the gateway did not become ready: {site.log('gateway').read_text()[-2000:]}")


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which is told to end on the way out."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
