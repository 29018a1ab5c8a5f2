"""A renewed certificate is used without a signal, however its files are replaced. Files that cannot be used change nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from lacre.errors import SettingsError
from lacre.runtime.watched_files import WatchedFiles, watch
from lacre_gateway.http.certificate import Certificate, tls_context, watched
from lacre_gateway.settings import Tls
from parts.certificates import DAY, Ca, Pair
from parts.stage import Stage, until

from .conftest import served

QUICK = 0.02  # seconds between looks


async def named(port: int, ca: Ca) -> str:
    """The name in the certificate that a new connection gets."""
    client = ssl.create_default_context(cafile=str(ca.file))
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
    [[(_, name)]] = writer.get_extra_info("ssl_object").getpeercert()["subject"]
    writer.close()
    return str(name)


@dataclass
class Renewed:
    """A gateway's certificate in `folder`, served on `port`, and what others do to its files."""

    stage: Stage
    ca: Ca
    folder: Path
    port: int = 0
    made: Path = field(init=False)

    def __post_init__(self) -> None:
        self.made = self.folder.parent / "made"
        self.made.mkdir()
        self.folder.mkdir()

    @property
    def tls(self) -> Tls:
        return Tls(certificate=self.folder / "tls.crt", key=self.folder / "tls.key")

    def issue(self, name: str, until: timedelta = 30 * DAY) -> Pair:
        return self.ca.issue(self.made, name, until=until)

    def put(self, pair: Pair) -> None:
        shutil.copy(pair.certificate, self.tls.certificate)
        shutil.copy(pair.key, self.tls.key)

    async def gets(self, name: str) -> None:
        async def got() -> bool:
            return await named(self.port, self.ca) == name

        await until(got)

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.stage.logged() if line["event"].startswith(event)]

    async def refused(self, words: str) -> None:
        """Until the log says why, and the last good certificate is still there."""
        await until(lambda: any(words in line["reason"] for line in self.lines("certificate refused")))
        assert await named(self.port, self.ca) == "first"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Certificate]:
        certificate = watched(self.tls, self.stage.gateway.log)
        async with served(self.stage.app, lambda: certificate.value) as (_, self.port):
            watching = asyncio.create_task(watch(lambda: [certificate], every=QUICK))
            try:
                yield certificate
            finally:
                watching.cancel()


@pytest.fixture
def renewed(stage: Stage, tmp_path: Path) -> Renewed:
    found = Renewed(stage, Ca(tmp_path / "ca"), tmp_path / "tls")
    found.put(found.issue("first"))
    return found


def in_place(renewed: Renewed, pair: Pair) -> None:
    renewed.put(pair)


def by_rename(renewed: Renewed, pair: Pair) -> None:
    pair.certificate.replace(renewed.tls.certificate)
    pair.key.replace(renewed.tls.key)


def by_link(renewed: Renewed, pair: Pair) -> None:
    """As a kubelet does: both files are links through `..data`, which is swapped in one rename."""
    data = renewed.folder / f"..{pair.key.stem}"
    data.mkdir()
    pair.certificate.replace(data / "tls.crt")
    pair.key.replace(data / "tls.key")
    (renewed.folder / "..new").symlink_to(data.name)
    (renewed.folder / "..new").replace(renewed.folder / "..data")
    for name in ("tls.crt", "tls.key"):
        if not (renewed.folder / name).is_symlink():
            (renewed.folder / name).unlink()
            (renewed.folder / name).symlink_to(f"..data/{name}")


@pytest.mark.parametrize("replaced", [in_place, by_rename, by_link])
async def test_a_renewed_certificate(renewed: Renewed, replaced: Callable[[Renewed, Pair], None]) -> None:
    replaced(renewed, renewed.issue("first"))
    async with renewed.serving():
        assert await named(renewed.port, renewed.ca) == "first"
        for name in ("second", "third"):
            replaced(renewed, renewed.issue(name))
            await renewed.gets(name)
    assert renewed.lines("certificate refused") == []
    assert len(renewed.lines("certificate taken")) == 2


async def test_a_connection_keeps_its_certificate(renewed: Renewed) -> None:
    client = ssl.create_default_context(cafile=str(renewed.ca.file))
    async with renewed.serving():
        reader, writer = await asyncio.open_connection("127.0.0.1", renewed.port, ssl=client)
        renewed.put(renewed.issue("second"))
        await renewed.gets("second")
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_half_of_a_new_pair(renewed: Renewed) -> None:
    """The certificate comes first, and its key later: told, and then used."""
    second = renewed.issue("second")
    async with renewed.serving():
        shutil.copy(second.certificate, renewed.tls.certificate)
        await renewed.refused("not PEM files of one key pair")
        shutil.copy(second.key, renewed.tls.key)
        await renewed.gets("second")
    assert len(renewed.lines("certificate refused")) == 1  # once, however often it was looked at


def cut_short(renewed: Renewed) -> None:
    renewed.tls.certificate.write_bytes(renewed.tls.certificate.read_bytes()[:200])


def swapped(renewed: Renewed) -> None:
    shutil.copy(renewed.issue("other").key, renewed.tls.key)


def gone(renewed: Renewed) -> None:
    renewed.tls.key.unlink()


def empty(renewed: Renewed) -> None:
    renewed.tls.certificate.write_bytes(b"")


def open_to_all(renewed: Renewed) -> None:
    renewed.put(renewed.issue("second"))
    renewed.tls.key.chmod(0o644)


def over(renewed: Renewed) -> None:
    renewed.put(renewed.issue("second", until=-DAY))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_short, "not PEM files"), (swapped, "not PEM files"), (gone, "No such file"), (empty, "not PEM files"),
        (open_to_all, "can be read by every user"), (over, "is not valid now"),
    ],
)  # fmt: skip
async def test_what_cannot_be_used_changes_nothing(renewed: Renewed, spoil: Callable[[Renewed], None], words: str) -> None:
    async with renewed.serving() as certificate:
        spoil(renewed)
        await renewed.refused(words)
        assert words in certificate.fault
        renewed.tls.key.unlink(missing_ok=True)  # the copy would keep the mode
        renewed.put(renewed.issue("third"))
        await renewed.gets("third")
        assert certificate.fault == ""


async def test_a_permission_is_enough(renewed: Renewed) -> None:
    """The files are the same, and only their mode is mended."""
    async with renewed.serving():
        open_to_all(renewed)
        await renewed.refused("chmod 600")
        renewed.tls.key.chmod(0o600)
        await renewed.gets("second")


async def test_one_that_is_over_is_better_than_none(renewed: Renewed) -> None:
    """The gateway starts with it, and a second one replaces it: neither is worse than the other."""
    renewed.put(renewed.issue("first", until=-DAY))
    certificate = watched(renewed.tls, renewed.stage.gateway.log)
    before = certificate.value
    renewed.put(renewed.issue("second", until=-DAY))
    assert certificate.refresh()
    assert certificate.value is not before


async def test_the_start_needs_files_that_hold(renewed: Renewed) -> None:
    swapped(renewed)
    with pytest.raises(SettingsError, match="one key pair"):
        watched(renewed.tls, renewed.stage.gateway.log)


async def test_an_encrypted_key_asks_nobody(renewed: Renewed) -> None:
    """OpenSSL would ask the terminal for its password, and the gateway would stand still."""
    key = serialization.load_pem_private_key(renewed.tls.key.read_bytes(), None)
    kind = serialization.BestAvailableEncryption(b"s3cr3t")
    renewed.tls.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind))
    with pytest.raises(SettingsError, match="one key pair"):
        tls_context(renewed.tls)


def test_files_that_still_change_are_left_alone(tmp_path: Path) -> None:
    """Reading waits for one look without a change; `refresh` does not wait."""
    file = tmp_path / "file"
    file.write_text("0")
    told: list[str | None] = []
    found = WatchedFiles([file], file.read_text, told.append)
    for number in range(1, 5):
        file.write_text("x" * number)
        assert not found.look()
    assert found.value == "0"
    assert found.look()
    assert (found.value, told) == ("xxxx", [None])
    assert not found.look()
    file.write_text("now")
    assert found.refresh()
    assert found.value == "now"


def test_a_file_of_the_same_size_and_time_is_another_one(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("one")
    other.write_text("two")
    for each in (file, other):
        os.utime(each, ns=(1, 1))
    found = WatchedFiles([file], file.read_text)
    other.replace(file)
    assert found.refresh()
    assert found.value == "two"


def test_of_two_threads_the_one_that_reads_last_decides(tmp_path: Path) -> None:
    path, begun, go = tmp_path / "value", threading.Event(), threading.Event()

    def read() -> str:
        content = path.read_text()
        if content == "second":
            begun.set()
            assert go.wait(30)
        return content

    path.write_text("first")
    watched = WatchedFiles([path], read)
    path.write_text("second")
    slow = threading.Thread(target=watched.refresh)
    slow.start()
    assert begun.wait(30)
    path.write_text("the third")
    quick = threading.Thread(target=watched.refresh)
    quick.start()
    quick.join(0.5)  # it may have to wait for the other one
    go.set()
    for thread in (slow, quick):
        thread.join()
    assert watched.value == "the third"
