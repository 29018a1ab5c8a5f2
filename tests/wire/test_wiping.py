"""A destroyed private key is gone from the memory of the process that used it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lacre.wire.header import Kem
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre.wire.wiping import overwrite
from parts.memory import found_in_memory, parts_of

WORKER = """
import sys
from pathlib import Path
from lacre.wire.header import Kem
from lacre.wire.opening import open_request
from lacre_fabric.keys.pool_keys import make, read

def step(name):
    print(name, flush=True)
    sys.stdin.readline()

folder, kem = Path(sys.argv[1]), Kem(int(sys.argv[2]))
make(folder, [1], [kem])
step("made")
read(folder / "1.key").destroy()
step("read")
key = read(folder / "1.key")
for _ in range(3):
    open_request({1: key}, (folder / "request").read_bytes())
step("used")
key.destroy()
step("destroyed")
"""


@pytest.mark.parametrize("kem", [Kem.XWING, Kem.X25519], ids=lambda kem: kem.label)
def test_gone_from_memory(tmp_path: Path, kem: Kem) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(int(kem))]
    found = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        while step := process.stdout.readline().strip():
            stored = (tmp_path / "1.key").read_bytes()
            found[step] = found_in_memory(process.pid, parts_of(stored))
            (tmp_path / "request").write_bytes(seal_request(PrivateKey.from_bytes(stored).config, b"a prompt")[0])
            process.stdin.write("\n")
            process.stdin.flush()
    held = {"secret", "d", "z", "x25519"} if kem is Kem.XWING else {"secret"}
    assert found == {"made": set(), "read": set(), "used": held, "destroyed": set()}


@pytest.mark.parametrize("size", [0, 1, 2, 32, 5000])
def test_overwrite(size: int) -> None:
    for secret in (bytearray(b"\xa5" * size), bytes([0xA5]) * size):
        overwrite(secret)
        assert bytes(secret) == (bytes(size) if size > 1 or isinstance(secret, bytearray) else b"\xa5" * size)
