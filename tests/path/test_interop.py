"""The npm package `lacre` through the running gateway to the real model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from parts.npm import install
from parts.up import Up

FOLDER = Path(__file__).resolve().parents[1] / "interop"
PACKAGE = FOLDER.parents[1] / "sdk" / "javascript"
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


@pytest.mark.slow
@pytest.mark.parametrize(("kem", "label"), [("xwing", "MLKEM768-X25519"), ("x25519", "X25519")])
def test_a_sealed_streaming_chat(up: Up, kem: str, label: str, tmp_path: Path) -> None:
    install(PACKAGE)
    environment = os.environ | {"LACRE_URL": up.url, "LACRE_TOKEN": up.token, "XDG_STATE_HOME": str(tmp_path)}
    options, body = json.dumps({"kems": [kem]}), json.dumps({"max_tokens": 64})
    command = [str(NODE), "ask.mjs", options, body, "Tell me a long story about the sea."]
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *pieces, totals = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(pieces) > 2
    [part] = totals["info"]["parts"]
    assert part["kem"] == part["audit"]["entry"]["kem"] == label
    assert part["receipt"]["completion_tokens"] == totals["usage"]["completion_tokens"] > 2
