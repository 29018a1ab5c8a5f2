"""The peers of `bench/gateway.py` that come from PyPI: LiteLLM's proxy, and SMG's gateway, which is Rust in a wheel.

Each has an environment of its own outside the clone, made from its lock in bench/. Both check an API key, and nothing else that
needs a database. LiteLLM uses its local map of costs, because it would fetch one at its start.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from bench.stand import MODELS, ended

LOCKS = Path(__file__).parent
READY = 120.0  # seconds: SMG looks for its upstream's models, LiteLLM imports for some 20 s on a busy machine


def environment(name: str, cache: Path) -> Path | None:
    """The folder of the peer's programs; None, with a line that says so, if it cannot be installed."""
    lock = LOCKS / name / f"{name}.lock"
    home = cache / name
    stamp = home / ".ready"
    key = sha256(lock.read_bytes() + sys.executable.encode()).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two runs do not make the same one at a time
        if stamp.exists() and stamp.read_text() == key:
            return home / "bin"
        print(f"installing the peer {name}", file=sys.stderr)
        pip = [home / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=False)
        wanted = [*pip, "--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", lock]
        if made.returncode or subprocess.run(wanted, check=False).returncode:
            print(f"left out: {name}, which could not be installed", file=sys.stderr)
            return None
        stamp.write_text(key)
    return home / "bin"


@contextmanager
def litellm(programs: Path, folder: Path, port: int, upstream: int) -> Iterator[tuple[int, str]]:
    """Its process id, and its key."""
    key = f"sk-{secrets.token_hex(32)}"
    folder.mkdir(parents=True)
    routes = [{"model": f"openai/{name}", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"} for name in MODELS]
    models = [{"model_name": name, "litellm_params": route} for name, route in zip(MODELS, routes, strict=True)]
    (folder / "config.yaml").write_text(json.dumps({"model_list": models}))  # JSON is YAML
    command = [programs / "litellm", "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    own = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with _serving([*command, "--telemetry", "False"], own, port, key) as pid:
        yield pid, key


@contextmanager
def smg(programs: Path, folder: Path, port: int, upstream: int) -> Iterator[tuple[int, str]]:
    """Its process id, and its key. A key on a command line is seen by all, but this one opens nothing."""
    key = f"sk-{secrets.token_hex(32)}"
    folder.mkdir(parents=True)
    command = [
        programs / "smg", "launch", "--host", "127.0.0.1", "--port", str(port), "--backend", "openai",
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--api-key", key, "--log-level", "error", "--log-dir", folder,
    ]  # fmt: skip
    with _serving(command, {}, port, key) as pid:
        yield pid, key


@contextmanager
def _serving(command: Sequence[str | Path], own: Mapping[str, str], port: int, key: str) -> Iterator[int]:
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, env=os.environ | own, stdout=nowhere, stderr=nowhere)
    with ended(process):
        _await_answer(port, key, process)
        yield process.pid


def _await_answer(port: int, key: str, process: subprocess.Popen[bytes]) -> None:
    """Returns once the peer answers a request as the load sends them."""
    said = json.dumps({"model": MODELS[0], "messages": [{"role": "user", "content": "x"}]}).encode()
    head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, said, head), timeout=5):
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.5)
    raise SystemExit(f"{process.args!r} does not answer".replace(key, "KEY"))
