"""A canary in the prompt: where it must not be found, and where it must, so that the search is known to work."""

from __future__ import annotations

import os
import threading

import pytest

import lacre
from parts.memory import found_in_memory
from parts.up import Up

CANARY = "zq7-albatross-" + os.urandom(6).hex()


def in_memory(pid: int, needle: bytes) -> bool:
    return bool(found_in_memory(pid, {"needle": needle}))


@pytest.mark.slow
def test_the_canary_is_with_the_worker_alone(env: Up, client: lacre.Client) -> None:
    children = env.children()
    found: dict[str, bool] = {}
    first = threading.Event()

    def ask() -> None:
        prompt = f"Tell me a very long story about a ship that is named {CANARY}."
        for _ in client.chat_stream(prompt, max_tokens=400):
            first.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert first.wait(30)
    for name, pid in children.items():
        found[name] = in_memory(pid, CANARY.encode())
    asking.join()
    assert found == {"nats-server": False, "lacre_gateway": False, "lacre_backend": True}
    for name in ("nats-server", "lacre_gateway"):
        assert not in_memory(children[name], CANARY.encode())
    for path in env.state.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_the_token_is_in_no_log(env: Up, client: lacre.Client) -> None:
    client.chat("Hi.", max_tokens=2)
    signature = env.token.rpartition(".")[2].encode()
    kept = [path for name in ("logs", "gateway") for path in (env.state / name).rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        assert signature not in path.read_bytes(), path


def test_secrets_are_private(env: Up) -> None:
    secrets = [*env.state.rglob("*.pem"), *env.state.rglob("*.key"), *env.state.glob("fabric/*"), env.state / "env"]
    assert len(secrets) > 8
    for path in secrets:
        assert path.stat().st_mode & 0o077 == 0, path
