"""Where `lacre up` puts the operators' console, and what of it a person decides."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lacre_fabric.operate import local_console
from lacre_fabric.operate.nats_server import free_port


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text('gateway = "g1"  # mine\n')
    return path


def read(settings: Path) -> dict[str, Any]:
    return tomllib.loads(settings.read_text())


def test_a_new_file_gets_it(settings: Path) -> None:
    port = free_port()
    assert local_console.write(settings, port, new=True) == f"http://127.0.0.1:{port}"
    told = read(settings)
    assert (told["admin"], told["console"]) == ({"port": port}, {"url": f"http://127.0.0.1:{port}"})
    assert "# mine" in settings.read_text()
    before = settings.read_bytes()
    assert local_console.write(settings, free_port(), new=False) == f"http://127.0.0.1:{port}", "its port stays"
    assert settings.read_bytes() == before


def test_any_port(settings: Path) -> None:
    assert local_console.write(settings, 0, new=True) is not None
    assert read(settings)["admin"]["port"] > 0


def test_another_program_has_its_port(settings: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        local_console.write(settings, taken, new=True)
        first = read(settings)["admin"]["port"]
        assert first != taken
    with socket.create_server(("127.0.0.1", first)):
        url = local_console.write(settings, 0, new=False)
    told = read(settings)
    assert told["admin"]["port"] != first
    assert url == told["console"]["url"] == f"http://127.0.0.1:{told['admin']['port']}"


@pytest.mark.parametrize(
    "tables",
    [
        "", "[admin]\nport = 8322\n", '[console]\nurl = "https://ops.example"\n[admin]\nport = 1\nhost = "0.0.0.0"\n',
        '[admin]\nport = 8322\n[console]\nurl = "http://127.0.0.1:9"\n', "admin = 1\nconsole = 2\n",
    ],
)  # fmt: skip
def test_what_a_person_wrote_stays(settings: Path, tables: str) -> None:
    """Also if it was removed. The given ports are not looked at."""
    settings.write_text(settings.read_text() + tables)
    before = settings.read_bytes()
    local_console.write(settings, free_port(), new=False)
    assert settings.read_bytes() == before


def test_a_setting_of_the_console_stays(settings: Path) -> None:
    local_console.write(settings, 0, new=True)
    settings.write_text(settings.read_text().replace("[console]", "[console]\nsession = 600 # short"))
    first = read(settings)["admin"]["port"]
    with socket.create_server(("127.0.0.1", first)):
        local_console.write(settings, 0, new=False)
    assert read(settings)["console"]["session"] == 600
    assert "# short" in settings.read_text()
