"""The peers of `bench/gateway.py`: nginx `proxy_pass`, the least that a hop can cost, and gateways for models.

All forward a POST to the same upstream, another nginx that answers at once with one record of 512 bytes. LiteLLM and SMG check
a key (`bench/python_peers.py`); nginx and Portkey check nothing. None signs or records anything. They live outside the clone,
and nothing is installed into the system. If a peer is not available, the run says so and continues without it.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import Task as Load
from bench.python_peers import environment, litellm, smg
from bench.stand import MODELS, REOPEN, ended, free_port, sizes

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacre" / "peers"
LOCKED = Path(__file__).with_name("portkey")
START = 30.0
_BEFORE, _AFTER = '{"model": "%s", "messages": [{"role": "user", "content": "', '"}]}'
_ANSWER = (
    '{"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "finish_reason": "stop", '
    '"message": {"role": "assistant", "content": "%s"}}], '
    '"usage": {"prompt_tokens": 64, "completion_tokens": 1, "total_tokens": 65}}'
)
_ANSWER %= "x" * (512 - len(_ANSWER) + len("%s"))
_LISTED = ", ".join(f'{{"id": "{name}", "object": "model", "created": 1, "owned_by": "bench"}}' for name in MODELS)
# One worker each, as our gateway is one process. A body stays in memory, and connections upstream are kept.
_NGINX = """
daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off; keepalive_requests 1000000000; client_max_body_size 8m; client_body_buffer_size 2m;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {more}
}}
"""
_UPSTREAM = """
    server {{ listen 127.0.0.1:{port}; default_type application/json;
        location = /v1/models {{ return 200 '{{"object": "list", "data": [{models}]}}'; }}
        location / {{ return 200 '{answer}'; }} }}
"""
_PROXY = """
    upstream answers {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000000; }}
    server {{ listen 127.0.0.1:{port}; location / {{
        proxy_pass http://answers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """pid: of the process that does the work. fields: request headers of its own. key: that it asks for."""

    port: int
    pid: int
    fields: str = ""
    key: str = field(default="sk-none", repr=False)

    def load(self, size: int, connections: int, **limits: Any) -> Load:
        """Requests of about `size` bytes, as it takes them. Sizes, models and connections change as for our gateway."""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\n{self.fields}"
        )
        bodies = []
        for number, each in enumerate(sizes(size)):
            before = _BEFORE % MODELS[number % len(MODELS)]
            content = before + "x" * (each - len(before) - len(_AFTER)) + _AFTER
            bodies.append((base64.b64encode(content.encode()).decode(), ""))
        return Load(self.port, connections, [head], bodies, reopen=REOPEN, **limits)


@contextmanager
def peers(folder: Path, *, quick: bool = False) -> Iterator[dict[str, Peer]]:
    """Those that run here, by name. folder: for their files. quick: only nginx and Portkey."""
    with ExitStack() as stack:
        nginx = _nginx()
        if nginx is None:
            print(
                "left out: nginx, and Portkey, which needs it as its upstream (Debian: apt-get install nginx)", file=sys.stderr
            )
            yield {}
            return
        upstream, port = free_port(), free_port()
        answers = _UPSTREAM.format(port=upstream, answer=_ANSWER, models=_LISTED)
        stack.enter_context(_serving(nginx, folder / "upstream", upstream, answers))
        proxy = _serving(nginx, folder / "proxy", port, _PROXY.format(port=port, upstream=upstream))
        running = {"nginx": Peer(port, stack.enter_context(proxy))}
        start = _portkey()
        if start is None:
            print("left out: Portkey, which needs Node.js and npm", file=sys.stderr)
        else:
            running["portkey"] = stack.enter_context(_portkey_serving(start, upstream))
        for name, serve in () if quick else (("litellm", litellm), ("smg", smg)):
            if (programs := environment(name, CACHE)) is not None:
                port = free_port()
                pid, key = stack.enter_context(serve(programs, folder / name, port, upstream))
                running[name] = Peer(port, pid, key=key)
        yield running


@contextmanager
def _serving(nginx: str, folder: Path, port: int, more: str) -> Iterator[int]:
    """The worker's process id."""
    folder.mkdir(parents=True)
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, more=more, user="user root;" if os.geteuid() == 0 else ""))
    master = subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"])
    with ended(master):
        _await_port(port, master)
        children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
        while not (found := children.read_text().split()):  # it listens before it has its worker
            time.sleep(0.02)
        yield int(found[0])


@contextmanager
def _portkey_serving(start: Path, upstream: int) -> Iterator[Peer]:
    port = free_port()
    environment = os.environ | {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1", "NODE_ENV": "production"}
    process = subprocess.Popen(
        ["node", start, "--headless", f"--port={port}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with ended(process):
        _await_port(port, process)
        host = f"x-portkey-custom-host: http://127.0.0.1:{upstream}/v1\r\n"
        yield Peer(port, process.pid, f"x-portkey-provider: openai\r\n{host}")


def _nginx() -> str | None:
    """The one that is there, or else Debian's, unpacked and not installed: its package would start a server."""
    folder = CACHE / "nginx"
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:{folder / 'usr' / 'sbin'}")
    if found is not None or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return found
    print("fetching the peer nginx", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "download", "nginx"]):
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    for package in folder.glob("nginx_*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=False)
    return shutil.which("nginx", path=str(folder / "usr" / "sbin"))


def _portkey() -> Path | None:
    """Its start file, installed by its lock into a folder outside the clone."""
    folder = CACHE / "portkey"
    start = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    lock = (LOCKED / "package-lock.json").read_text()
    stamp = folder / ".ready"
    if start.exists() and stamp.exists() and stamp.read_text() == lock:
        return start
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    print("installing the peer Portkey", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(LOCKED / name, folder)
    done = subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, check=False)
    if done.returncode != 0 or not start.exists():
        return None
    stamp.write_text(lock)
    return start


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"{process.args!r} does not listen")
