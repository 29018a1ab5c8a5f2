"""The small routes: the manifest, health and readiness; and the process around them."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import problems
from lacre.jose.jws import raw_public_key
from lacre.problems import Problem
from lacre.trust import chain
from lacre_fabric.keys.secret_files import write_ed25519
from lacre_fabric.nats.roles import Credential
from parts.issuer import Issuer
from parts.stage import Stage


async def test_manifest_is_served_as_published(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await client.get("/v1/manifest")
    assert response.content == stage.bucket
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-cache"
    assert chain.verify(response.content, raw_public_key(stage.keys.root), time.time()).manifest.version == 1


async def test_manifest_is_asked_for_again_by_its_tag(stage: Stage, client: httpx2.AsyncClient) -> None:
    tag = (await client.get("/v1/manifest")).headers["etag"]
    for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        again = await client.get("/v1/manifest", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert (await client.get("/v1/manifest", headers={"if-none-match": '"other"'})).status_code == 200
    await stage.publish(stage.document(2))
    changed = await client.get("/v1/manifest", headers={"if-none-match": tag})
    assert (changed.status_code, changed.content) == (200, stage.bucket)
    assert changed.headers["etag"] != tag


async def test_no_manifest(tmp_path: Path, issuer: Issuer) -> None:
    stage = Stage.with_gateway(tmp_path, issuer)
    async with stage.http() as client:
        response = await client.get("/v1/manifest")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.content == problems.NOT_READY.body({"request_id": response.headers["lacre-request-id"]})
    assert stage.logged()[-1]["reason"] == "manifest: none was read"
    await stage.gateway.close()


async def test_ready(stage: Stage, client: httpx2.AsyncClient) -> None:
    """Also where one pool is away."""
    for away in ([], ["default"]):
        stage.hub.cut_off.update(away)
        response = await client.get("/readyz")
        detail = response.json()
        assert (response.status_code, detail["status"], detail["missing"], detail["away"]) == (200, "ready", {}, away)
        assert detail["manifest"]["version"] == 1


async def test_not_ready_says_what_is_missing(stage: Stage, client: httpx2.AsyncClient) -> None:
    async def missing() -> set[str]:
        response = await client.get("/readyz")
        assert response.status_code == 503 and response.headers["retry-after"]
        return set(json.loads(response.content)["missing"])

    fabric, stage.gateway.fabric = stage.gateway.fabric, None
    assert await missing() == {"fabric"}
    stage.gateway.fabric = fabric
    assert fabric is not None
    await fabric.close()
    assert await missing() == {"fabric"}
    stage.gateway.fabric = stage.hub.gateway()
    await stage.publish(stage.document(2, gateway_key=raw_public_key(Ed25519PrivateKey.generate())))
    assert await missing() == {"signing_key"}
    await stage.publish(stage.document(3, lives=0.05))
    await asyncio.sleep(0.06)
    assert await missing() == {"manifest"}


async def test_a_fault_of_the_gateway_has_its_request_s_id(stage: Stage) -> None:
    stage.gateway.feed = None  # type: ignore[assignment]
    transport = httpx2.ASGITransport(stage.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
        response = await client.get("/v1/manifest")
    named = {"request_id": response.headers["lacre-request-id"]}
    assert (response.status_code, response.content) == (500, problems.INTERNAL.body(named))
    assert response.headers["lacre-request-id"] == stage.logged()[-1]["request_id"]


async def test_sealed_requests_are_not_served_behind_another_server(stage: Stage) -> None:
    """It would not bound them. The log tells the operator why."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(stage.app), base_url="http://gateway.test") as client:
        response = await stage.post(client)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert problems.Problem.type_in(response.content) == problems.NOT_READY.type
    assert "listener" in stage.logged()[-1]["reason"]


async def test_health_needs_nothing_and_probes_are_not_logged(stage: Stage, client: httpx2.AsyncClient) -> None:
    await client.get("/readyz")
    stage.gateway.fabric = None
    response = await client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert (await client.head("/healthz")).status_code == 200
    assert stage.logged() == []
    await client.get("/readyz")
    [line] = stage.logged()
    assert (line["route"], line["status"]) == ("/readyz", 503)


def settings_file(stage: Stage, port: int) -> Path:
    write_ed25519(stage.folder / "grant.key", stage.keys.gateway)
    Credential.new("gateway-g1").save(stage.folder / "gateway.creds")
    text = stage.settings_text().replace('audit = "audit"', 'audit = "another"')  # the other one is in use
    text = text.replace("[nats]", f"listen = {{ port = {port}, drain = 2 }}\n[nats]")
    with socket.create_server(("127.0.0.1", 0)) as unused:  # a port where no NATS is
        text = text.replace("4222", str(unused.getsockname()[1]))
    path = stage.folder / "gateway.toml"
    path.write_text(text)
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lacre_gateway", "--settings", str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_process_serves_before_its_fabric_is_there_and_ends_in_order(stage: Stage) -> None:
    process = start(settings_file(stage, 0))
    assert process.stderr is not None
    try:
        line = json.loads(process.stderr.readline())
        assert line["event"] == "listening"
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{line['port']}") as http:
            assert (await http.get("/healthz")).status_code == 200
            assert set((await http.get("/readyz")).json()["missing"]) == {"fabric", "manifest"}
            token = stage.issuer.token()
            refused = await stage.post(http, token)
            assert Problem.type_in(refused.content) == problems.UNAVAILABLE.type  # nor does it know what was revoked
        process.send_signal(signal.SIGTERM)
        _, rest = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    entries = [json.loads(line) for line in rest.splitlines()]
    assert entries[-1]["event"] == "stopped"
    assert {"fabric.error", "fabric not connected"} & {entry["event"] for entry in entries}
    assert token not in rest.decode()


async def test_process_that_cannot_start_says_why(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(settings_file(stage, taken.getsockname()[1]))
        _, said = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 1
    assert b"listen: cannot listen on 127.0.0.1 port" in said and b"Traceback" not in said
