"""Gateway processes as an operator runs them: several behind one port, drained, hung up on, killed; what the doctor says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import httpx2
import pytest
from cryptography import x509

import lacre
from lacre_fabric.operate.leash import PYTHON
from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.doctor import State, examine
from lacre_gateway.settings import shipped
from parts.certificates import Ca
from parts.chat_app import ChatApp
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.stage import GatewayProcess, LiveStage
from parts.stage.settings import issuer_table
from parts.stage.standing import entries
from parts.up import descendants, wait_until_gone
from parts.waiting import until


class SlowApp(ChatApp):
    """Streams its first word at once, and the rest when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        sent = 0

        async def slowly(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += 1
            if sent == 3:
                await self.go_on.wait()
            await send(message)

        await super().__call__(scope, receive, slowly)


@dataclass
class Running(GatewayProcess):
    """app: the one behind it. admin: a port; those of further processes come after it."""

    app: SlowApp = field(init=False)
    issuer: Issuer = field(init=False)
    token: str = field(init=False)
    admin: int = field(init=False)

    def client(self) -> lacre.AsyncClient:
        return lacre.AsyncClient(self.url, token=self.token, memory=lacre.VersionMemory(), shape="none")

    async def serves(self) -> None:
        """A request, on a connection of its own: it has to be let in."""
        async with self.client() as client:
            assert (await client.chat("s3cr3t-canary", max_tokens=8)).text == "one two three"

    async def all_ready(self, count: int) -> None:
        """Until each of so many processes serves; their admin ports tell them apart."""
        for number in range(count):
            await until(lambda number=number: self.gauge(number, "lacre_ready"), 60, self.said)

    async def not_ready(self) -> None:
        async with httpx2.AsyncClient(trust_env=False) as http:
            while (await http.get(f"{self.base_url}/readyz")).status_code != 503:
                await asyncio.sleep(0.01)

    async def gauge(self, number: int, name: str) -> float:
        try:
            async with httpx2.AsyncClient(trust_env=False) as http:
                text = (await http.get(f"http://127.0.0.1:{self.admin + number}/metrics")).text
        except httpx2.TransportError:
            return 0.0
        return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def entries(self, folder: str = "", *kinds: str) -> list[dict[str, Any]]:
        return entries(self.settings.parent / "audit-g1" / folder, *kinds)

    async def ended(self, seconds: float = 30) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait, seconds), seconds + 1)


@pytest.fixture
async def running(tmp_path: Path, issuer: Issuer, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    """Its parameters: lines of the table [listen], and how many processes there are."""
    listen, processes = getattr(request, "param", ("", 1))
    (tmp_path / "jwks.json").write_text(json.dumps(issuer.jwks()))
    app, admin = SlowApp(), free_port()
    async with LiveStage.on_air(tmp_path, app, gateways=0) as cluster:
        tables = f"{listen}\n[admin]\nport = {admin}\n{issuer_table(ISSUER, AUDIENCE, tmp_path / 'jwks.json')}"
        running = Running.configured(cluster.site, "g1", [cluster.server.url], shipped(), tables, drain=20)
        running.settings.write_text(f"processes = {processes}\n{running.settings.read_text()}")
        Ca(tmp_path / "ca").issue(running.settings.parent, "own")  # for a test that serves TLS
        running.app, running.issuer, running.token, running.admin = app, issuer, issuer.token(), admin
        running.start()
        try:
            await running.all_ready(processes)
            yield running
        finally:
            app.go_on.set()
            await asyncio.to_thread(running.stop)


TWO = pytest.mark.parametrize("running", [("", 2)], indirect=True)


async def named(port: int) -> str:
    """The name in the certificate that a new connection gets, whoever signed it."""
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
    [name] = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True)).subject
    writer.close()
    return str(name.value)


@pytest.mark.parametrize("running", [('tls = {certificate = "own.pem", key = "own.key"}', 2)], indirect=True)
async def test_a_renewed_certificate_needs_no_signal(running: Running, tmp_path: Path) -> None:
    """All processes use it, and one that was written wrong in between changes nothing."""
    port, folder = int(running.base_url.rpartition(":")[2]), running.settings.parent

    async def everywhere(name: str) -> bool:
        return {await named(port) for _ in range(12)} == {name}  # the kernel gives each to either

    assert await everywhere("own")
    second = Ca(tmp_path / "second").issue(tmp_path, "second")
    (folder / "own.key").write_bytes(second.key.read_bytes())  # and its certificate not yet
    await until(lambda: sum(line["event"].startswith("certificate refused") for line in running.logged()) == 2, 30)
    assert await everywhere("own")
    (folder / "own.pem").write_bytes(second.certificate.read_bytes())
    await until(lambda: everywhere("second"), 30)
    await until(lambda: sum(line["event"] == "certificate taken" for line in running.logged()) == 2, 30)


@TWO
async def test_settings_reach_all_processes(running: Running) -> None:
    """By an administrator's call to one of them. A file that is wrong changes none, and requests are served meanwhile."""
    running.app.go_on.set()
    good = running.settings.read_text()
    token = running.issuer.token(scope="lacre:admin", sub="root")

    async def call(method: str, number: int, path: str) -> dict[str, Any]:
        async with httpx2.AsyncClient(trust_env=False, timeout=60, headers={"authorization": f"Bearer {token}"}) as http:
            said: dict[str, Any] = (await http.request(method, f"http://127.0.0.1:{running.admin + number}{path}")).json()
            return said

    def reloaded() -> list[str]:
        return sorted(
            {
                line["gateway"]
                for line in running.logged()
                if line["event"] == "settings reloaded" and "limits" in line["reason"]
            }
        )

    running.settings.write_text(f"{good}\n[limits]\nqueue_limt = 3\n")
    assert "queue_limt" in (await call("POST", 0, "/v1/reload"))["settings"]["fault"]
    running.settings.write_text(f"{good}\n[limits]\nqueue_limit = 3\n".replace("processes = 2", "processes = 3"))
    told = (await call("POST", 0, "/v1/reload"))["settings"]
    assert told == {"changed": ["limits"], "restart": ["processes"], "fault": None}
    await until(lambda: len(reloaded()) == 2, 60)
    for number in (0, 1):
        assert (await call("GET", number, "/v1/status"))["settings"]["restart"] == ["processes"]
    await running.serves()


@TWO
async def test_several_processes(running: Running) -> None:
    """They share a port and nothing else; one that is killed comes back, and the others serve meanwhile."""
    running.app.go_on.set()
    parents = descendants(running.process.pid)
    assert len(parents) == 2
    for _ in range(12):  # the kernel gives each to either
        await running.serves()
    for number in ("0", "1"):
        assert running.entries(number, "intent")
    assert {int(await running.gauge(number, "lacre_audit_entries")) for number in (0, 1)} != {0}
    os.kill(parents[0], signal.SIGKILL)
    await until(lambda: parents[0] not in (now := descendants(running.process.pid)) and len(now) == 2, 30)
    await running.all_ready(2)
    for _ in range(6):
        await running.serves()
    [death] = [line for line in running.logged() if line["event"] == "process died"]
    assert death["status"] == -signal.SIGKILL
    children = descendants(running.process.pid)
    running.process.terminate()
    assert await running.ended() == 0
    assert wait_until_gone(children) == []
    for number in ("0", "1"):
        assert running.entries(number)[-1]["event"] == "stopped"
    assert len({line["gateway"] for line in running.logged() if line["event"] == "listening"}) == 2


@TWO
async def test_processes_die_with_the_one_that_watches(running: Running) -> None:
    children = descendants(running.process.pid)
    running.process.kill()
    await running.ended()
    assert wait_until_gone(children) == []


async def test_settings_that_no_process_can_start_with(running: Running) -> None:
    text = running.settings.read_text().replace("processes = 1", "processes = 2").replace("grant.pem", "nowhere.pem")
    other = running.settings.with_name("other.toml")
    port = running.base_url.rpartition(":")[2]
    other.write_text(text.replace(f"port = {port}", f"port = {free_port()}").replace("audit-g1", "audit-other"))
    command = [*PYTHON, "-m", "lacre_gateway", "--settings", str(other)]
    failed = await asyncio.to_thread(subprocess.run, command, check=False, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "nowhere.pem" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("running", "how"), [(("drain_delay = 2", 1), "signal"), (("drain_delay = 2", 1), "api")], indirect=["running"]
)
async def test_drain(running: Running, how: str) -> None:
    """Not ready at once; still serving; then streams finish, and what they did is on the disk before the process ends."""
    async with running.client() as client, running.client() as another:
        pieces = aiter(client.chat_stream("Tell me a story.", max_tokens=8))
        first = await anext(pieces)
        if how == "signal":
            running.process.terminate()
        else:
            token = running.issuer.token(scope="lacre:admin", sub="root")
            async with httpx2.AsyncClient(trust_env=False, headers={"authorization": f"Bearer {token}"}) as admin:
                assert (await admin.post(f"http://127.0.0.1:{running.admin}/v1/drain")).status_code == 202
        await running.not_ready()
        late = aiter(another.chat_stream("And me?", max_tokens=8))  # taken, in the time that balancers have to notice
        assert await anext(late) == "one "
        while not refuses(running.base_url):  # the delay is over: nobody new is let in
            await asyncio.sleep(0.05)
        assert running.process.poll() is None
        running.app.go_on.set()
        assert first + "".join([piece async for piece in pieces]) == "one two three"
        assert "".join([piece async for piece in late]) == "two three"
    assert await running.ended() == 0
    outcomes = running.entries("", "outcome")
    assert [(each["outcome"], each["completion_tokens"]) for each in outcomes] == [("answered", 3)] * 2
    assert running.entries()[-1]["event"] == "stopped"


async def asked(at: tuple[asyncio.StreamReader, asyncio.StreamWriter], path: str) -> bytes:
    """The head of the answer, after its body was read too."""
    reader, writer = at
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    return head


@pytest.mark.parametrize("running", [("drain_delay = 60", 1)], indirect=True)
async def test_a_draining_gateway_closes_connections_that_it_kept(running: Running) -> None:
    """Each after an answer that says so: a client never sends a request into a connection that ends."""
    port = int(running.base_url.rpartition(":")[2])
    kept = [await asyncio.open_connection("127.0.0.1", at) for at in (port, port, running.admin)]
    paths = ("/healthz", "/v1/manifest", "/metrics")
    for at, path in zip(kept, paths, strict=True):
        assert b"connection: close" not in await asked(at, path)
    running.process.terminate()
    await running.not_ready()
    kept.append(await asyncio.open_connection("127.0.0.1", port))  # a balancer that has not noticed yet
    for at, path in zip(kept, (*paths, "/readyz"), strict=True):
        assert b"\r\nconnection: close\r\n" in await asked(at, path)
        async with asyncio.timeout(5):
            assert await at[0].read() == b""
        at[1].close()
    running.process.terminate()
    assert await running.ended(20) == 0


def refuses(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("running", [("drain_delay = 60", 1)], indirect=True)
async def test_a_second_signal_ends_the_delay(running: Running) -> None:
    running.process.terminate()
    await running.not_ready()
    running.process.terminate()
    assert await running.ended(20) == 0


async def test_rules_and_log_on_hangup(running: Running) -> None:
    """SIGHUP ends nothing; the log holds JSON alone, and no secret of the request's."""
    running.app.go_on.set()
    running.process.send_signal(signal.SIGHUP)
    await running.serves()
    running.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.2)
    assert running.process.poll() is None
    await asyncio.to_thread(running.stop)
    text = running.log.read_text()
    assert "s3cr3t" not in text and "eyJ" not in text
    assert running.logged()[-1]["event"] == "stopped"


async def doctor(settings: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lacre", "doctor", "--settings", str(settings), *arguments]
    return await asyncio.to_thread(subprocess.run, command, check=False, capture_output=True, text=True, timeout=90)


@pytest.mark.slow
async def test_the_doctor_of_a_healthy_gateway(running: Running) -> None:
    done = await doctor(running.settings, "--json")
    shown = json.loads(done.stdout)
    assert (shown["ok"], done.returncode) == (True, 0)
    found = {finding["check"]: finding for finding in shown["findings"]}
    for check in ("settings", "audit", "signing_key", "nats.credentials", "policies", "issuers.0", "fabric", "manifest",
                  "grants", "queue default", "workers default", "clock", "open files"):  # fmt: skip
        assert found[check]["state"] == "ok", found[check]
    assert found["port"]["state"] == "warning"  # taken, by this very gateway
    running.app.go_on.set()
    await running.serves()  # which was not disturbed
    table = await doctor(running.settings)
    assert table.returncode == 0 and "what to do" in table.stdout


ILLS = [
    ("grant.pem", "nowhere.pem", "signing_key", "cannot read"),
    ("grant.pem", "../issuer.pem", "grants", "another key"),
    ('trust = "', 'trust = "A', "settings", "trust"),
    ('audience = "', 'audiance = "', "settings", "nearest known one is 'audience'"),
    ("jwks.json", "nowhere.json", "issuers.0", "cannot read"),
    ('jwks = "', 'jwks_url = "http://127.0.0.1:9/keys" # "', "issuers.0", ISSUER),
    ('policies = "', 'policies = "/nowhere', "policies", "cannot be read"),
    ("audit-g1", "/proc/nowhere", "audit", "cannot be written"),
    ("nats://127.0.0.1:", "nats://127.0.0.2:", "fabric", "cannot connect"),
    ("nats://127.0.0.1:", "nats://127.0.0.1:1", "settings", "nats.url"),
    ("[listen]", '[listen]\nhost = "192.0.2.1"', "port", "192.0.2.1"),
    ("[listen]", '[listen]\ntls = { certificate = "nowhere", key = "grant.pem" }', "tls", "nowhere"),
]


@pytest.mark.slow
async def test_what_the_doctor_finds(running: Running) -> None:
    """Each ill by itself: it is the one that is told, with what to do, and the exit code says so."""
    text = running.settings.read_text()
    files = [running.settings.with_name(f"ill-{number}.toml") for number in range(len(ILLS))]
    for file, (old, new, _, _) in zip(files, ILLS, strict=True):
        assert old in text
        file.write_text(text.replace(old, new, 1))
    examined = await asyncio.gather(*(asyncio.to_thread(examine, file) for file in files))  # each mostly waits for a server
    for (_, _, check, told), each in zip(ILLS, examined, strict=True):
        found = {finding.check: finding for finding in each}
        assert found[check].state is State.FAILED, found
        assert told in found[check].detail and found[check].remedy
    done = await doctor(files[-1], "--json")
    assert (json.loads(done.stdout)["ok"], done.returncode) == (False, 1)
    assert running.process.poll() is None


@pytest.mark.slow
@pytest.mark.skipif(
    which("slowhttptest") is None, reason="slowhttptest is not installed (Debian: apt-get install slowhttptest)"
)
@pytest.mark.parametrize("running", [("header_timeout = 3", 1)], indirect=True)
@pytest.mark.parametrize(("attack", "target"), [("-H", "/healthz"), ("-B", "/v1/sealed"), ("-X", "/v1/manifest")])
async def test_slow_clients_stop_nobody(running: Running, attack: str, target: str) -> None:
    """A thousand connections with heads that never end, bodies that trickle, or answers that nobody reads."""
    running.app.go_on.set()
    command = [
        "slowhttptest", attack, "-c", "1000", "-r", "500", "-i", "1", "-l", "15", "-p", "5", "-u", running.base_url + target,
        "-f", "message/ohttp-chunked-req", "-s", "100000",
    ]  # fmt: skip
    await running.serves()  # a token that was seen before is not what the throttle of bad ones is for
    attacking = asyncio.create_task(asyncio.to_thread(subprocess.run, command, check=False, capture_output=True, text=True))
    answers = 0
    while not attacking.done():
        await running.serves()
        answers += 1
    said = (await attacking).stdout
    assert answers > 5 and "service available:" in said
    assert not re.search(r"service available:\W*(\x1b\S*)?\s*NO", said), said
    if attack == "-H":
        assert "No open connections left" in said, said  # each was ended by the gateway, not by the attacker
