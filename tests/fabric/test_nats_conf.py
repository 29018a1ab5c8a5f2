"""What we write of nats-server's configuration, nats-server reads: whatever a folder is called."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.operate import nats_conf
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.site import Site

NAMES = [
    "José",
    "模型 😀",
    "two words",
    "it's",
    'q"uo\\te',
    "new\nline",
    "$HOME",
    "# {hash}; [x]",
    "tab\t\x7f\x01",
    os.fsdecode(b"\xff"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_server_runs_in_any_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    server = NatsServer(folder, free_port())
    server.configure(Site(tmp_path / "state", {"default": ("m",)}).roles())
    process = server.start(tmp_path / "nats.log")
    try:
        assert (folder / "jetstream").is_dir(), "its store is in this folder, and in no other"
    finally:
        process.terminate()
        process.wait(10)


def test_plain_text_is_json_too() -> None:
    config = {"a": 1, "b": [True, "x", {}, []], "c": {"d": {"e": "f"}}, "g": 1.5}
    assert json.loads(nats_conf.encode(config)) == config


def test_bytes_beyond_ascii_are_one_escape_each() -> None:
    assert nats_conf.encode({"a": 'é"\\\n'}).split(b": ")[1].strip(b"\n}") == rb'"\xC3\xA9\x22\x5C\x0A"'


@pytest.mark.parametrize("config", [{"é": 1}, {'a"': 1}, {"": 1}, {"a": None}, {"a": b"x"}, {"a": "\ud800"}])
def test_what_the_format_cannot_hold(config: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        nats_conf.encode(config)
