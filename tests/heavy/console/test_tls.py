"""The console over TLS in Chromium: a real handshake with the admin listener's server, and cookies that stay on it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
from pathlib import Path

import anyio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.console.console import OperatorsConsole
from lacre_gateway.http.certificate import tls_context
from lacre_gateway.http.server import bind, make_server
from lacre_gateway.settings import Listen, Tls
from parts.certificates import Ca
from parts.issuer import Issuer
from parts.npm import install
from parts.stage import Stage
from parts.waiting import PATIENCE, until

HERE = Path(__file__).resolve().parent


def pin(certificate: Path) -> str:
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    return base64.b64encode(hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()).decode()


async def test_over_tls(tmp_path: Path) -> None:
    install(HERE)
    pair, port = Ca(tmp_path).issue(tmp_path, "admin"), free_port()
    url = f"https://127.0.0.1:{port}"
    async with Stage.on_air(tmp_path, Issuer(), settings=f'admin.port = {port}\nconsole.url = "{url}"\n') as stage:
        console = OperatorsConsole(stage.gateway)
        stage.stack.push_async_callback(console.close)
        console.extend(stage.admin)
        listen, tls = Listen(port=port, drain=1), Tls(certificate=pair.certificate, key=pair.key)
        with bind(listen) as listener:
            server = make_server(stage.admin, listen, lambda: tls_context(tls))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                await until(lambda: server.started, PATIENCE)
                code = console.site.links.make(stage.issuer.token(scope="lacre:admin"), "root of acme")
                environment = {
                    "PATH": os.environ["PATH"], "HOME": str(tmp_path), "CHROMIUM": str(shutil.which("chromium")),
                    "CONSOLE": url, "LINK": f"{url}/console/open?code={code}", "PIN": pin(pair.certificate),
                }  # fmt: skip
                done = await anyio.run_process(["node", "tls.mjs"], cwd=HERE, env=environment, check=False)
            finally:
                server.should_exit = True
                await serving
                await server.settle()
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["faults"] == []
    assert told["protocol"] == "TLS 1.3"
    assert {status for status, _ in told["pages"]} == {200}
    assert told["cookies"] == [["__Host-", True, True]]
    assert told["out"] == "You are signed out"
    assert told["refused"] == "ERR_CERT_AUTHORITY_INVALID", "another browser does not trust this authority"
