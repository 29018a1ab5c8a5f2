"""Gateway processes as an operator runs them: several behind one port, drained, hung up on, killed; what the doctor says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import httpx2
import pytest

import lacre
from lacre.jose.jws import b64u
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.doctor import State, examine
from parts.chat_app import ChatApp
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.stage import LiveStage
from parts.up import descendants, wait_until_gone


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
class Running:
    """A `lacre gateway` of `cluster` with settings of its own."""

    cluster: LiveStage
    issuer: Issuer
    app: SlowApp
    settings: Path
    port: int
    admin: int
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        with self.log.open("ab") as output:
            command = leashed([*PYTHON, "-m", "lacre_gateway", "--settings", str(self.settings)])
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    @property
    def log(self) -> Path:
        return self.settings.with_suffix(".log")

    def __post_init__(self) -> None:
        self.token = self.issuer.token()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> lacre.AsyncClient:
        url = self.cluster.site.connection_string(self.base_url)
        return lacre.AsyncClient(url, token=self.token, memory=lacre.VersionMemory(), shape="none")

    async def get(self, url: str) -> httpx2.Response:
        async with httpx2.AsyncClient(trust_env=False) as http:
            return await http.get(url)

    async def ready(self, count: int = 1) -> None:
        """Until each of so many processes serves; their admin ports tell them apart."""
        async with asyncio.timeout(60):
            for number in range(count):
                while not await self._gauge(number, "lacre_ready"):
                    assert self.process.poll() is None, self.log.read_text()
                    await asyncio.sleep(0.05)

    async def _gauge(self, number: int, name: str) -> float:
        try:
            text = (await self.get(f"http://127.0.0.1:{self.admin + number}/metrics")).text
        except httpx2.TransportError:
            return 0.0
        return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def entries(self, folder: str = "") -> list[dict[str, Any]]:
        return [json.loads(entry) for entry in LogReader(self.settings.parent / "audit-own" / folder).entries()]

    async def ended(self, seconds: float = 30) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), seconds)

    async def stop(self) -> None:
        self.app.go_on.set()
        if self.process.poll() is None:
            self.process.terminate()
        await self.ended()


@pytest.fixture
async def running(tmp_path: Path, issuer: Issuer, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    options: Mapping[str, object] = getattr(request, "param", {})
    app = SlowApp()
    async with LiveStage.on_air(tmp_path, app, gateways=0) as cluster:
        running = configured(tmp_path, issuer, app, cluster, options)
        running.start()
        try:
            await running.ready(int(str(options.get("processes", 1))))
            yield running
        finally:
            await running.stop()


def configured(folder: Path, issuer: Issuer, app: SlowApp, cluster: LiveStage, options: Mapping[str, object]) -> Running:
    (folder / "jwks.json").write_text(json.dumps(issuer.jwks()))
    port, admin, site = free_port(), free_port(), cluster.site
    settings = site.folder / "gateway" / "own.toml"
    settings.write_text(f"""
        gateway = "g1"
        public_url = "http://127.0.0.1:{port}"
        trust = "{b64u(site.root)}"
        signing_key = "grant.pem"
        audit = "audit-own"
        processes = {options.get("processes", 1)}
        [listen]
        port = {port}
        drain = 20
        drain_delay = {options.get("drain_delay", 0)}
        header_timeout = {options.get("header_timeout", 15)}
        [admin]
        port = {admin}
        [nats]
        url = "{cluster.server.url}"
        credentials = "{cluster.site.credential_file("gateway-g1")}"
        [[issuers]]
        issuer = "{ISSUER}"
        audience = "{AUDIENCE}"
        algorithms = ["EdDSA", "ES256", "RS256"]
        jwks = "{folder / "jwks.json"}"
    """)
    return Running(cluster, issuer, app, settings, port, admin)


@pytest.mark.parametrize("running", [{"processes": 2}], indirect=True)
async def test_several_processes(running: Running) -> None:
    """They share a port and nothing else; one that is killed comes back, and the others serve meanwhile."""
    running.app.go_on.set()
    parents = descendants(running.process.pid)
    assert len(parents) == 2

    async def ask(count: int) -> None:
        for _ in range(count):  # each on a connection of its own, which the kernel gives to either
            async with running.client() as client:
                assert (await client.chat("Hi.", max_tokens=8)).text == "one two three"

    await ask(12)
    for number in ("0", "1"):
        assert [entry["kind"] for entry in running.entries(number)].count("intent") > 0
    assert {int(await running._gauge(number, "lacre_audit_entries")) for number in (0, 1)} != {0}
    os.kill(parents[0], signal.SIGKILL)
    async with asyncio.timeout(30):
        while parents[0] in descendants(running.process.pid) or len(descendants(running.process.pid)) < 2:
            await asyncio.sleep(0.05)
    await running.ready(2)
    await ask(6)
    [death] = [line for line in running.logged() if line["event"] == "process died"]
    assert death["status"] == -signal.SIGKILL
    children = descendants(running.process.pid)
    running.process.terminate()
    assert await running.ended() == 0
    assert wait_until_gone(children, 5) == []
    for number in ("0", "1"):
        assert running.entries(number)[-1]["event"] == "stopped"
    assert len({line["gateway"] for line in running.logged() if line["event"] == "listening"}) == 2


@pytest.mark.parametrize("running", [{"processes": 2}], indirect=True)
async def test_processes_die_with_the_one_that_watches(running: Running) -> None:
    children = descendants(running.process.pid)
    running.process.kill()
    await running.ended()
    assert wait_until_gone(children, 10) == []


async def test_settings_that_no_process_can_start_with(running: Running) -> None:
    text = running.settings.read_text().replace("processes = 1", "processes = 2").replace("grant.pem", "nowhere.pem")
    other = running.settings.with_name("other.toml")
    other.write_text(text.replace(f"port = {running.port}", f"port = {free_port()}").replace("audit-own", "audit-other"))
    command = [*PYTHON, "-m", "lacre_gateway", "--settings", str(other)]
    failed = await asyncio.to_thread(subprocess.run, command, check=False, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "nowhere.pem" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("running", "how"), [({"drain_delay": 2}, "signal"), ({"drain_delay": 2}, "api")], indirect=["running"]
)
async def test_drain(running: Running, how: str) -> None:
    """Not ready at once; still serving; then streams finish, and what they did is on the disk before the process ends."""
    async with running.client() as client, running.client() as another:
        stream = client.chat_stream("Tell me a story.", max_tokens=8)
        pieces = aiter(stream)
        first = await anext(pieces)
        if how == "signal":
            running.process.terminate()
        else:
            token = running.issuer.token(scope="lacre:admin", sub="root")
            async with httpx2.AsyncClient(trust_env=False, headers={"authorization": f"Bearer {token}"}) as admin:
                assert (await admin.post(f"http://127.0.0.1:{running.admin}/v1/drain")).status_code == 202
        async with asyncio.timeout(10):
            while (await running.get(f"{running.base_url}/readyz")).status_code != 503:
                await asyncio.sleep(0.01)
        late = another.chat_stream("And me?", max_tokens=8)  # taken, in the time that balancers have to notice
        late_pieces = aiter(late)
        assert await anext(late_pieces) == "one "
        while not refuses(running.port):  # the delay is over: nobody new is let in
            await asyncio.sleep(0.05)
        assert running.process.poll() is None
        running.app.go_on.set()
        assert first + "".join([piece async for piece in pieces]) == "one two three"
        assert "".join([piece async for piece in late_pieces]) == "two three"
    assert await running.ended() == 0
    entries = running.entries()
    outcomes = [entry for entry in entries if entry["kind"] == "outcome"]
    assert [(each["outcome"], each["completion_tokens"]) for each in outcomes] == [("answered", 3)] * 2
    assert entries[-1]["event"] == "stopped"


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("running", [{"drain_delay": 60}], indirect=True)
async def test_a_second_signal_ends_the_delay(running: Running) -> None:
    running.process.terminate()
    async with asyncio.timeout(10):
        while (await running.get(f"{running.base_url}/readyz")).status_code != 503:
            await asyncio.sleep(0.01)
    running.process.terminate()
    assert await running.ended(20) == 0


async def test_rules_and_log_on_hangup(running: Running) -> None:
    """SIGHUP ends nothing; the log holds JSON alone, and no secret of the request's."""
    running.app.go_on.set()
    running.process.send_signal(signal.SIGHUP)
    async with running.client() as client:
        assert (await client.chat("s3cr3t-canary", max_tokens=8)).text
    running.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.2)
    assert running.process.poll() is None
    await running.stop()
    text = running.log.read_text()
    assert "s3cr3t" not in text and "eyJ" not in text
    assert [line["event"] for line in running.logged()][-1] == "stopped"


async def doctor(settings: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lacre", "doctor", "--settings", str(settings), *arguments]
    return await asyncio.to_thread(subprocess.run, command, check=False, capture_output=True, text=True, timeout=90)


async def findings(settings: Path) -> tuple[int, dict[str, dict[str, str]]]:
    done = await doctor(settings, "--json")
    shown = json.loads(done.stdout)
    assert shown["ok"] is (done.returncode == 0), done.stderr
    return done.returncode, {finding["check"]: finding for finding in shown["findings"]}


@pytest.mark.slow
async def test_the_doctor_of_a_healthy_gateway(running: Running) -> None:
    status, found = await findings(running.settings)
    assert status == 0
    for check in ("settings", "audit", "signing_key", "nats.credentials", "policies", "issuers.0", "fabric", "manifest",
                  "grants", "queue default", "workers default", "clock", "open files"):  # fmt: skip
        assert found[check]["state"] == "ok", found[check]
    assert found["port"]["state"] == "warning"  # taken, by this very gateway
    running.app.go_on.set()
    async with running.client() as client:  # which was not disturbed
        assert (await client.chat("Hi.", max_tokens=8)).text == "one two three"
    table = await doctor(running.settings)
    assert table.returncode == 0
    assert "what to do" in table.stdout


ILLS = [
    ("grant.pem", "nowhere.pem", "signing_key", "cannot read"),
    ("grant.pem", "../issuer.pem", "grants", "another key"),
    ('trust = "', 'trust = "A', "settings", "trust"),
    ('audience = "', 'audiance = "', "settings", "nearest known one is 'audience'"),
    ("jwks.json", "nowhere.json", "issuers.0", "cannot read"),
    ('jwks = "', 'jwks_url = "http://127.0.0.1:9/keys" # "', "issuers.0", ISSUER),
    ("[listen]", 'policies = "nowhere"\n[listen]', "policies", "nowhere"),
    ("audit-own", "/proc/nowhere", "audit", "cannot be written"),
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
        assert told in found[check].detail
        assert found[check].remedy
    assert (await findings(files[-1]))[0] == 1
    assert running.process.poll() is None


@pytest.mark.slow
@pytest.mark.skipif(
    which("slowhttptest") is None, reason="slowhttptest is not installed (Debian: apt-get install slowhttptest)"
)
@pytest.mark.parametrize("running", [{"header_timeout": 3}], indirect=True)
@pytest.mark.parametrize("attack", ["-H", "-B", "-X"])
async def test_slow_clients_stop_nobody(running: Running, attack: str) -> None:
    """A thousand connections with heads that never end, bodies that trickle, or answers that nobody reads."""
    running.app.go_on.set()
    target = {"-H": "/healthz", "-B": "/v1/sealed", "-X": "/v1/manifest"}[attack]
    command = [
        "slowhttptest", attack, "-c", "1000", "-r", "500", "-i", "1", "-l", "15", "-p", "5", "-u", running.base_url + target,
        "-f", "message/ohttp-chunked-req", "-s", "100000",
    ]  # fmt: skip
    async with running.client() as client:  # a token that was seen before is not what the throttle of bad ones is for
        assert (await client.chat("Hi.", max_tokens=8)).text
    attacking = asyncio.create_task(asyncio.to_thread(subprocess.run, command, check=False, capture_output=True, text=True))
    answers = 0
    while not attacking.done():
        async with running.client() as client:  # on a connection of its own each time: it has to be let in
            assert (await client.chat("Hi.", max_tokens=8)).text == "one two three"
        answers += 1
    said = (await attacking).stdout
    assert answers > 5
    assert "service available:" in said
    assert not re.search(r"service available:\W*(\x1b\S*)?\s*NO", said), said
    if attack == "-H":
        assert "No open connections left" in said, said  # each was ended by the gateway, not by the attacker
