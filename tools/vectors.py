"""Writes `docs/vectors/KEM-AEAD.json`: one exchange in each suite that is published beside the default one, with every
intermediate value of docs/wire.md sections 4 to 7. The insides are those of the default suite's file, which is left as it is.

New keys and nonces each time: run it only when the format changes, and commit what it writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from lacre.wire import hpke, ohttp
from lacre.wire.header import Aead, Kdf, Kem
from lacre.wire.opening import PrivateKey, ResponseSealer

FOLDER: Final = Path(__file__).resolve().parent.parent / "docs" / "vectors"
DEFAULT: Final = "xwing-aes-256-gcm.json"
SUITES: Final = {
    "xwing-chacha20-poly1305": (Kem.XWING, Aead.CHACHA20_POLY1305),
    "x25519-aes-128-gcm": (Kem.X25519, Aead.AES_128_GCM),
}
NONCE: Final = bytes(range(32))


def exchange(kem: Kem, aead: Aead, about: str, like: dict[str, object]) -> dict[str, object]:
    """The vector of one suite. like: the default suite's, for the plaintexts."""
    secret_key = os.urandom(32)  # published with the vector: nothing else may ever use it
    key = PrivateKey(1, kem, secret_key, ((Kdf.HKDF_SHA256, aead),))
    plaintext = bytes.fromhex(str(like["request_binary_http"]))
    sealer = ohttp.RequestSealer(key.config)
    header, suite = sealer.header, sealer.header.suite
    half = len(plaintext) // 2
    first = sealer.seal(plaintext[:half])
    rest, _ = sealer.finish(plaintext[half:])
    shared_secret = key.decapsulate(header.enc)
    info = ohttp.request_info(header)
    secret = hpke.Context(suite, shared_secret, info).export(
        b"message/bhttp chunked response", ohttp.response_nonce_length(suite)
    )
    nonce = NONCE[: ohttp.response_nonce_length(suite)]
    prk = hpke.extract(header.enc + nonce, secret)
    response = ResponseSealer(header, secret, nonce)
    response.seal(b"")
    records = [bytes.fromhex(record) for record in like["response_records"]]  # type: ignore[attr-defined]
    chunks = [response.seal(record).hex() for record in records]
    return {
        "about": about,
        "secret_key": secret_key.hex(),
        "key_configuration": key.config.encode().hex(),
        "request_binary_http": plaintext.hex(),
        "info": info.hex(),
        "header": header.raw.hex(),
        "header_sha256": header.digest.hex(),
        "shared_secret": shared_secret.hex(),
        "request_chunks": [first[len(header.raw) :].hex(), rest.hex()],
        "exported_secret": secret.hex(),
        "response_nonce": nonce.hex(),
        "prk": prk.hex(),
        "response_key": hpke.expand(prk, b"key", aead.n_key).hex(),
        "response_base_nonce": hpke.expand(prk, b"nonce", aead.n_nonce).hex(),
        "response_records": like["response_records"],
        "response_chunks": [*chunks, response.finish().hex()],
    }


def main() -> None:
    like = json.loads((FOLDER / DEFAULT).read_text())
    for name, (kem, aead) in SUITES.items():
        suite = f"{kem.label}, HKDF-SHA256, {aead.name}"
        about = f"One exchange in {suite}; every value in hexadecimal. docs/wire.md says what each is."
        (FOLDER / f"{name}.json").write_text(json.dumps(exchange(kem, aead, about, like), indent=1) + "\n")


if __name__ == "__main__":
    main()
