"""AWS's requests and answers, by moto's server. It lets disabled keys decrypt: nothing here proves a revocation."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from pathlib import Path

import httpx2

from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import free_port
from parts.key_services import Key

START = 60.0  # seconds
REGION = "eu-central-1"


class Moto:
    revokes = False

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        with (folder / "moto.log").open("ab") as log:
            command = leashed([*PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)])
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        secret = secrets.token_urlsafe(30)
        self.secrets = (secret,)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        self.absent = f"awskms://127.0.0.1:{free_port()}/alias/none?region={REGION}"
        self._ready()

    def key(self) -> Key:
        headers = {
            "X-Amz-Target": "TrentService.CreateKey",
            "Content-Type": "application/x-amz-json-1.1",
            "Authorization": f"AWS4-HMAC-SHA256 Credential=x/20260101/{REGION}/kms/aws4_request, Signature=0",
        }
        with httpx2.Client(trust_env=False) as client:
            said = client.post(f"http://127.0.0.1:{self._port}/", json={}, headers=headers).raise_for_status().json()
        arn = said["KeyMetadata"]["Arn"]
        return Key(f"awskms://127.0.0.1:{self._port}/{arn}?region={REGION}", arn)

    def revoke(self, key: Key) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _ready(self) -> None:
        deadline = time.monotonic() + START
        with httpx2.Client(trust_env=False) as client:
            while True:
                assert self._process.poll() is None, "moto did not start"
                try:
                    client.get(f"http://127.0.0.1:{self._port}/moto-api/")
                    return
                except httpx2.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
