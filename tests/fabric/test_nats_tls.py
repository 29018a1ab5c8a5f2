"""A client says nothing to a message server that does not prove who it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_fabric.nats import roles
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.settings import NatsServers, parse
from lacre_fabric.work.contract import FabricRefused, FabricUnavailable, FabricUntrusted
from parts.certificates import DAY, Ca
from parts.nats_cluster import EXAMPLE, NatsCluster, Node
from parts.waiting import until

PROVISIONER = Credential.new("provisioner")
FOR_CLIENTS = 'key_file: "node.key"\n  min_version: "1.2"'
ASKS = FOR_CLIENTS + '\n  ca_file: "ca.pem"\n  verify: true'


def single(folder: Path, conf: str | None = None) -> NatsCluster:
    return NatsCluster(folder, [roles.provisioner(PROVISIONER)], {}, conf, size=1)


@asynccontextmanager
async def running(cluster: NatsCluster) -> AsyncIterator[Servers]:
    try:
        cluster.start()
        for node in cluster.nodes:
            await node.listening()
        yield cluster.servers
    finally:
        cluster.stop()


async def connects(servers: Servers) -> bool:
    connection = await Connection.open(servers, PROVISIONER)
    try:
        return connection.connected
    finally:
        await connection.close()


async def refusal(servers: Servers) -> str:
    with pytest.raises(FabricUntrusted) as caught:
        await connects(servers)
    return str(caught.value)


async def test_a_server_is_trusted_by_the_ca_of_the_settings_alone(tmp_path: Path) -> None:
    other = Ca(tmp_path, "other")
    async with running(single(tmp_path / "cluster")) as servers:
        assert await connects(servers)
        for ca in (other.file, None):
            assert "not signed by a trusted CA: set nats.ca to the CA" in await refusal(replace(servers, ca=ca))


async def test_the_end_of_a_server_brings_no_warning_of_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cluster = single(tmp_path)
    async with running(cluster) as servers:
        connection = await Connection.open(servers, PROVISIONER)
        cluster.stop()
        await until(lambda: not connection.connected)
        await connection.close()
    assert [each.getMessage() for each in caplog.records if each.name == "asyncio"] == []


async def test_what_waits_for_a_lost_server_keeps_nobody_from_closing(tmp_path: Path) -> None:
    """The library would flush it into the lost connection, and leave its own end half done."""
    cluster = single(tmp_path)
    async with running(cluster) as servers:
        connection = await Connection.open(servers, PROVISIONER)
        cluster.stop()
        await until(lambda: not connection.connected)
        await connection.client.publish("$JS.API.INFO", b"kept for the next connection")
        assert connection.client.pending_data_size
        closed: list[bool] = []

        async def told() -> None:
            closed.append(True)

        connection.client._closed_cb = told
        await connection.close()
    assert closed == [True], "the library came to its end"


@pytest.mark.parametrize(
    ("certified", "told"),
    [
        ({"until": -DAY}, "is not valid now: renew it"),
        ({"host": "nats.example"}, "is for another host: use one of its names"),
        ({"host": "127.0.0.2"}, "is for another host: use one of its names"),
    ],
    ids=["expired", "another name", "another address"],
)
async def test_a_certificate_that_does_not_hold(tmp_path: Path, certified: dict[str, Any], told: str) -> None:
    cluster = single(tmp_path)
    cluster.nodes[0].certify(cluster.ca, **certified)
    async with running(cluster) as servers:
        assert told in await refusal(servers)


async def test_a_server_may_ask_for_a_certificate(tmp_path: Path) -> None:
    cluster = single(tmp_path / "cluster", EXAMPLE.read_text().replace(FOR_CLIENTS, ASKS, 1))
    client, stranger = cluster.ca.issue(tmp_path, "client"), Ca(tmp_path, "other").issue(tmp_path, "stranger")
    async with running(cluster) as servers:
        assert await connects(replace(servers, certificate=client.certificate, key=client.key))
        for wrong in (servers, replace(servers, certificate=stranger.certificate, key=stranger.key)):
            with pytest.raises(FabricUnavailable, match=r"requires? a client certificate"):
                await connects(wrong)


async def test_the_password_is_not_for_a_server_that_says_it_speaks_no_tls() -> None:
    """What anybody on the way can make of the first line, which is in the clear."""
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps({"version": "2.15.1", "max_payload": 1024, "headers": True}).encode() + b"\r\n")
        heard.extend(await reader.read())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "does not use TLS: configure `tls`" in await refusal(Servers((f"tls://127.0.0.1:{port}",)))
    assert not heard


@pytest.mark.slow
async def test_another_server_does(tmp_path: Path) -> None:
    """One is down, one has a certificate of another host; whichever comes first."""
    cluster = single(tmp_path / "cluster")
    impostor = single(tmp_path / "impostor")
    impostor.nodes[0].certify(cluster.ca, "nats.example")
    async with running(cluster) as servers, running(impostor) as others:
        many = replace(servers, urls=(*others.urls, f"tls://127.0.0.1:{free_port()}", *servers.urls))
        for _ in range(5):
            assert await connects(many)
        with pytest.raises(FabricRefused, match="Authorization Violation"):
            await Connection.open(many, Credential("provisioner", "wrong"))
        assert "is for another host" in await refusal(replace(many, urls=many.urls[:2]))
    with pytest.raises(FabricUnavailable):
        await connects(servers)


MISTAKES = {
    'url = ["tls://a:1", "nats://b:1"]': "tls:// before every address",
    "url = []": "write an address such as",
    'url = "nats://a:1"\nca = "ca.pem"': "write tls://",
    'url = "tls://a:1"\nkey = "key.pem"': "go together",
    'url = ["tls://a:1", "tls://user:secret@b:1"]': "take user and password out",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_settings(text: str) -> None:
    with pytest.raises(SettingsError, match=MISTAKES[text]):
        parse(NatsServers, text, Path("settings.toml"))


def test_settings(tmp_path: Path) -> None:
    text = 'url = ["tls://a:4222", "tls://b"]\nca = "ca.pem"\ncertificate = "me.pem"\nkey = "me.key"'
    servers = parse(NatsServers, text, tmp_path / "settings.toml").servers
    files = (tmp_path / name for name in ("ca.pem", "me.pem", "me.key"))
    assert servers == Servers(("tls://a:4222", "tls://b"), *files)
    Ca(tmp_path)
    with pytest.raises(SettingsError, match=r"me.pem, .*me.key: give PEM files"):
        servers.context()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("", "no certificate in PEM form"), ("-----BEGIN CERTIFICATE-----\nMIIB", "cut short")],
)
def test_a_ca_that_is_none_is_named(content: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=f"nats.ca: cannot use .*ca.pem \\(.*{reason}"):
        Servers(("tls://a:4222",), file).context()


@pytest.mark.slow
async def test_renewed_certificates_are_for_the_next_handshake(tmp_path: Path) -> None:
    """Of both sides, with another CA, while a client is connected; and files that cannot be used change nothing."""
    cluster = single(tmp_path / "cluster", EXAMPLE.read_text().replace(FOR_CLIENTS, ASKS, 1))
    [node] = cluster.nodes
    client, ca = cluster.ca.issue(tmp_path, "client"), tmp_path / "trusted.pem"
    ca.write_bytes(cluster.ca.file.read_bytes())
    async with running(cluster) as servers:
        mine = replace(servers, ca=ca, certificate=client.certificate, key=client.key)
        connection = await Connection.open(mine, PROVISIONER)
        try:
            client.certificate.write_bytes(client.certificate.read_bytes()[:100])
            ca.write_text("nothing")
            await restarted(node, connection)
            assert "nats.ca: cannot use" in connection.trust.fault
            other = Ca(tmp_path / "other")
            node.certify(other)
            (node.folder / "ca.pem").write_bytes(other.file.read_bytes())
            other.issue(tmp_path, "client")
            ca.write_bytes(other.file.read_bytes())
            await restarted(node, connection)
            assert connection.trust.fault == ""
        finally:
            await connection.close()


async def restarted(node: Node, connection: Connection) -> None:
    """Until the connection is back, on a server that has started again."""
    back = asyncio.Event()
    connection.on_reconnect = back.set
    node.stop()
    node.start([node])
    await asyncio.wait_for(back.wait(), 60)
