"""nginx in front of the gateways, as a deployment has it: it buffers nothing, and passes by a gateway that does not answer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from parts.stage.processes import launched

# A request whose bytes went out is never sent to a second gateway: nginx holds a POST to be no idempotent method.
_CONFIG = """
daemon off;
master_process off;
error_log {folder}/error.log warn;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 8m;
    upstream gateways {{ {servers} keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://gateways;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_buffering off;
            proxy_connect_timeout 1s;
            proxy_read_timeout 30s;
            proxy_next_upstream error timeout;
        }}
    }}
}}
"""


def installed() -> str | None:
    """nginx, where there is one."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@dataclass
class Balancer:
    """gateways: their addresses. A failure puts one aside for two seconds."""

    folder: Path
    port: int
    gateways: Sequence[str]
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        program = installed()
        assert program is not None, "nginx is not installed (Debian: apt-get install nginx-light)"
        self.folder.mkdir()
        servers = " ".join(f"server {urlsplit(url).netloc} max_fails=1 fail_timeout=2s;" for url in self.gateways)
        (config := self.folder / "nginx.conf").write_text(_CONFIG.format(folder=self.folder, port=self.port, servers=servers))
        self.process = launched([program, "-c", str(config)], self.folder / "start.log")
