"""Keys, signer and root change while requests run; old pins go on, old keys are gone."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import lacre
from lacre.errors import UntrustedRoot
from lacre.trust.chain import ConnectionString
from lacre.wire.header import Kem
from parts.memory import found_in_memory, parts_of
from parts.up import Up
from parts.waiting import PATIENCE, wait_until

REQUESTS = 50
CLIENTS = 3
PAUSE = 0.3  # seconds between a client's requests


@dataclass
class Load:
    """Clients that ask one question after another until `stop`; half of them begin anew with each."""

    up: Up
    memory: Path
    done: int = 0
    failed: list[lacre.LacreError] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            with self.up.client(memory=lacre.VersionFile(self.memory)) as client:
                while not self._stop.wait(PAUSE):
                    self._one(client)
                    if number % 2:
                        break

    def _one(self, client: lacre.Client) -> None:
        try:
            reply = client.chat("Name a sea.", max_tokens=2)
        except lacre.LacreError as exc:
            with self._lock:
                self.failed.append(exc)
        else:
            with self._lock:
                self.done += bool(reply.text)
                self.attempts.append(reply.attempts)


@pytest.mark.slow
def test_under_a_steady_load(own: Up, tmp_path: Path) -> None:
    keys = own.state / "pools" / "default" / "keys"
    old = {
        f"{name} {part}": value for name in ("1.key", "2.key") for part, value in parts_of((keys / name).read_bytes()).items()
    }
    worker, first = own.children()["lacre_backend"], ConnectionString.parse(own.url).root
    assert "1.key secret" in found_in_memory(worker, old)
    load = Load(own, tmp_path / "memory")
    load.start()
    try:
        wait_until(lambda: load.done >= 5 or load.failed, PATIENCE)
        own.command("keys", "rotate", "--grace", "3")
        wait_until(lambda: {path.name for path in keys.glob("*.key")} == {"3.key", "4.key"}, 20)
        own.command("signer", "rotate")
        roots = [own.command("root", "rotate") for _ in range(2)]
        wait_until(lambda: load.done >= REQUESTS or load.failed, 2 * PATIENCE)
    finally:
        load.stop()
    print(f"{load.done} requests, {len(load.failed)} failed, {load.attempts.count(2)} sealed twice")
    assert load.failed == []
    assert load.done >= REQUESTS
    assert set(load.attempts) == {1, 2}  # those that knew the old key alone had to be told, once

    # The old key is nowhere: not in the processes that had it, and not on disk.
    for pid in (worker, own.process.pid):
        assert found_in_memory(pid, old) == set()
    for path in own.state.rglob("*"):
        if path.is_file():
            assert not any(value in path.read_bytes() for value in old.values()), path

    # The first pin leads to the last root; the newest pin keeps the memory of the first.
    assert len({own.url, *roots}) == 3
    memory = lacre.VersionFile(tmp_path / "memory")
    for url in (own.url, *roots):
        with dataclasses.replace(own, url=url).client(memory=memory, kem=[Kem.X25519]) as client:
            assert client.chat("Name a sea.", max_tokens=2).text
    stranger = str(ConnectionString(own.base_url, bytes(reversed(first))))
    with dataclasses.replace(own, url=stranger).client() as client, pytest.raises(UntrustedRoot):
        client.chat("Name a sea.", max_tokens=2)


@pytest.mark.slow
def test_what_was_begun_is_ended_at_the_next_start(tmp_path: Path) -> None:
    """A retirement is due while nothing runs; the settings of the next start pin the new root."""
    with Up.start(tmp_path / "state") as live:
        first, token = live.url, live.token
        keys = live.state / "pools" / "default" / "keys"
        live.command("keys", "rotate", "--grace", "4")
    assert {path.name for path in keys.iterdir()} == {"1.key", "2.key", "3.key", "4.key"}
    live.command("root", "rotate")
    with Up.start(tmp_path / "state", "--rotate-hours", "0.003") as live:
        assert live.url.partition("?")[2] != first.partition("?")[2]
        old_pin = ConnectionString(live.base_url, ConnectionString.parse(first).root)
        for url in (str(old_pin), live.url):
            with lacre.Client(url, token=token, memory=lacre.VersionMemory()) as client:
                assert client.chat("Name a sea.", max_tokens=2).text
        # And the next ones came by themselves.
        wait_until(lambda: (keys / "5.key").exists() and not (keys / "1.key").exists(), 30)
