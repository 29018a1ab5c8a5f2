"""AWS's requests and answers, by moto's server. It lets disabled keys decrypt: nothing here proves a revocation."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import httpx2

from lacre_fabric.operate.leash import PYTHON
from lacre_fabric.operate.nats_server import free_port
from parts.key_services import Key
from parts.stage.processes import launched, stopped
from parts.waiting import PATIENCE, wait_until

REGION = "eu-central-1"


class Moto:
    revokes = False

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        command = [*PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = launched(command, folder / "moto.log")
        secret = secrets.token_urlsafe(30)
        self.secrets = (secret,)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": secret, "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        self.absent = f"awskms://127.0.0.1:{free_port()}/alias/none?region={REGION}"
        wait_until(self._ready, PATIENCE)

    def key(self) -> Key:
        headers = {
            "X-Amz-Target": "TrentService.CreateKey",
            "Content-Type": "application/x-amz-json-1.1",
            "Authorization": f"AWS4-HMAC-SHA256 Credential=x/20260101/{REGION}/kms/aws4_request, Signature=0",
        }
        made = httpx2.post(f"http://127.0.0.1:{self._port}/", json={}, headers=headers, trust_env=False)
        arn = made.raise_for_status().json()["KeyMetadata"]["Arn"]
        return Key(f"awskms://127.0.0.1:{self._port}/{arn}?region={REGION}", arn)

    def revoke(self, key: Key) -> None:
        raise NotImplementedError

    def close(self) -> None:
        stopped(self._process)

    def _ready(self) -> bool:
        assert self._process.poll() is None, "moto did not start"
        try:
            return httpx2.get(f"http://127.0.0.1:{self._port}/moto-api/", trust_env=False).is_success
        except httpx2.TransportError:
            return False
