"""A real PKCS#11 token: SoftHSM's. Its module reads SOFTHSM2_CONF once a process, so there is one stand in each."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pkcs11

from lacre_fabric.keys.secret_files import write_secret
from parts.key_services import Key

MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/opt/homebrew/lib/softhsm/libsofthsm2.so")


def module() -> Path | None:
    found = [Path(path) for path in MODULES if Path(path).exists()]
    return found[0] if found and shutil.which("softhsm2-util") else None


class SoftHsm:
    revokes = True

    def __init__(self, folder: Path) -> None:
        path = module()
        assert path is not None
        self._module = path
        (folder / "tokens").mkdir()
        conf = folder / "softhsm2.conf"
        conf.write_text(f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.environment = {"SOFTHSM2_CONF": str(conf)}
        self._pin = secrets.token_hex(8)
        self.secrets = (self._pin,)
        self._pin_file = folder / "pin"
        write_secret(self._pin_file, self._pin.encode())
        pins = ["--pin", self._pin, "--so-pin", secrets.token_hex(8)]
        command = ["softhsm2-util", "--init-token", "--free", "--label", "lacre", *pins]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **self.environment})
        self.absent = self._address("none", token="gone")

    def key(self) -> Key:
        name = f"pool-{secrets.token_hex(4)}"
        with self._session() as session:
            session.generate_key(pkcs11.KeyType.AES, 256, label=name, store=True)
        return Key(self._address(name), name)

    def revoke(self, key: Key) -> None:
        with self._session() as session:
            session.get_key(label=key.name)[pkcs11.Attribute.DECRYPT] = False

    def destroy(self, key: Key) -> None:
        with self._session() as session:
            session.get_key(label=key.name).destroy()

    def close(self) -> None:
        """The token's files go with the folder."""

    def _address(self, name: str, token: str = "lacre") -> str:
        return f"pkcs11:token={token};object={name}?module-path={self._module}&pin-source=file:{self._pin_file}"

    def _session(self) -> Any:
        return pkcs11.lib(str(self._module)).get_token(token_label="lacre").open(rw=True, user_pin=self._pin)
