"""What a client begins with: connection strings, and the key configurations that a manifest names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lacre.jose.jws import b64u
from lacre.trust.chain import ConnectionString
from lacre.wire.header import Aead, Kdf, Kem, KeyConfig
from lacre.wire.ohttp import RequestSealer
from lacre.wire.opening import PrivateKey
from refusals.form import IN_MESSAGES, Case, Said, packed, said, unpacked

ROOT: Final = b64u(bytes(range(32)))
STRINGS: Final = {
    "as it should be": f"lacre://gateway.example?trust={ROOT}",
    "with a port": f"lacre://gateway.example:8443?trust={ROOT}",
    "with a slash": f"lacre://gateway.example/?trust={ROOT}",
    "white space around it": f"  lacre://gateway.example?trust={ROOT}\n",
    "an unknown parameter": f"lacre://gateway.example?news=1&trust={ROOT}",
    "an IPv6 address": f"lacre://[2001:db8::1]:8443?trust={ROOT}",
    "loopback in the clear": f"lacre+http://127.0.0.1:9?trust={ROOT}",
    "loopback in the clear, by its name": f"lacre+http://localhost:9?trust={ROOT}",
    "loopback in the clear, IPv6": f"lacre+http://[::1]:9?trust={ROOT}",
    "another address of loopback": f"lacre+http://127.8.9.10:9?trust={ROOT}",
    "in the clear to another host": f"lacre+http://gateway.example?trust={ROOT}",
    "in the clear to a name that begins like loopback": f"lacre+http://127.0.0.1.example?trust={ROOT}",
    "in the clear to a name of localhost": f"lacre+http://localhost.example?trust={ROOT}",
    "in the clear to any address": f"lacre+http://0.0.0.0:9?trust={ROOT}",
    "in the clear to a private address": f"lacre+http://10.0.0.1:9?trust={ROOT}",
    "in the clear to a mapped address": f"lacre+http://[::ffff:10.0.0.1]:9?trust={ROOT}",
    "loopback as one number": f"lacre+http://2130706433:9?trust={ROOT}",
    "loopback with a part left out": f"lacre+http://127.1:9?trust={ROOT}",
    "loopback in octal": f"lacre+http://0177.0.0.1:9?trust={ROOT}",
    "a scheme in capitals": f"LACRE://gateway.example?trust={ROOT}",
    "another scheme": f"https://gateway.example?trust={ROOT}",
    "no scheme": f"gateway.example?trust={ROOT}",
    "no host": f"lacre://?trust={ROOT}",
    "a port alone": f"lacre://:8443?trust={ROOT}",
    "no port after its colon": f"lacre://gateway.example:?trust={ROOT}",
    "a port too large": f"lacre://gateway.example:65536?trust={ROOT}",
    "a port that is no number": f"lacre://gateway.example:x?trust={ROOT}",
    "a user": f"lacre://me@gateway.example?trust={ROOT}",
    "an empty user": f"lacre://@gateway.example?trust={ROOT}",
    "a user and a password": f"lacre://me:secret@gateway.example?trust={ROOT}",
    "a path": f"lacre://gateway.example/v1?trust={ROOT}",
    "two slashes": f"lacre://gateway.example//?trust={ROOT}",
    "a backslash": f"lacre://gateway.example\\evil.example?trust={ROOT}",
    "a fragment": f"lacre://gateway.example?trust={ROOT}#more",
    "an empty fragment": f"lacre://gateway.example?trust={ROOT}#",
    "a line break in the host": f"lacre://gateway\n.example?trust={ROOT}",
    "a tab in the host": f"lacre://gateway\t.example?trust={ROOT}",
    "a line break in the key": f"lacre://gateway.example?trust={ROOT[:9]}\n{ROOT[9:]}",
    "a space in the host": f"lacre://gateway example?trust={ROOT}",
    "a percent in the host": f"lacre://gateway%2eexample?trust={ROOT}",
    "a label of 64 characters": f"lacre://{'a' * 64}.example?trust={ROOT}",
    "two dots in the host": f"lacre://gateway..example?trust={ROOT}",
    "no key": "lacre://gateway.example",
    "an empty key": "lacre://gateway.example?trust=",
    "two keys": f"lacre://gateway.example?trust={ROOT}&trust={ROOT}",
    "an empty key and one": f"lacre://gateway.example?trust=&trust={ROOT}",
    "a key of 31 bytes": f"lacre://gateway.example?trust={b64u(bytes(31))}",
    "a key of 33 bytes": f"lacre://gateway.example?trust={b64u(bytes(33))}",
    "a padded key": f"lacre://gateway.example?trust={ROOT}=",
    "a key with loose bits": f"lacre://gateway.example?trust={ROOT[:-1]}9",
    "a key in percent form": f"lacre://gateway.example?trust=%{ord(ROOT[0]):02x}{ROOT[1:]}",
    "nothing": "",
}


def config(kem: Kem, *algorithms: tuple[int, int], public: bytes | None = None, key_id: int = 1) -> bytes:
    """A key configuration of any algorithms, known or not. public: in the place of an honest key."""
    honest = PrivateKey.derive(key_id, kem, bytes(32)).config.public_key
    pairs = b"".join(kdf.to_bytes(2, "big") + aead.to_bytes(2, "big") for kdf, aead in algorithms)
    return bytes([key_id]) + kem.to_bytes(2, "big") + (public or honest) + len(pairs).to_bytes(2, "big") + pairs


HKDF: Final = int(Kdf.HKDF_SHA256)
AES_128, AES_256, CHACHA = int(Aead.AES_128_GCM), int(Aead.AES_256_GCM), int(Aead.CHACHA20_POLY1305)
USUAL: Final = config(Kem.X25519, (HKDF, AES_256))
HYBRID: Final = PrivateKey.derive(1, Kem.XWING, bytes(32)).config.public_key
CONFIGS: Final = {
    "as it should be": USUAL,
    "X-Wing": config(Kem.XWING, (HKDF, AES_256)),
    "all algorithms, the preferred one last": config(Kem.X25519, (HKDF, AES_128), (HKDF, CHACHA), (HKDF, AES_256)),
    "unknown algorithms beside known ones": config(Kem.X25519, (0x7777, AES_256), (HKDF, 0x7777), (HKDF, CHACHA)),
    "unknown algorithms alone": config(Kem.X25519, (0x7777, AES_256), (HKDF, 0x7777)),
    "an algorithm that seals nothing": config(Kem.X25519, (HKDF, 0xFFFF)),
    "an unknown KEM": b"\x01\x77\x77" + USUAL[3:],
    "an unknown KEM, and nothing behind it": b"\x01\x77\x77",
    "no algorithms": config(Kem.X25519),
    "algorithms of 3 bytes": USUAL[:35] + b"\0\3\0\1\0",
    "algorithms that are cut short": USUAL[:-1],
    "a byte too much": USUAL + b"\0",
    "a length of algorithms beyond the end": USUAL[:35] + b"\0\x08" + USUAL[37:],
    "a key that is cut short": USUAL[:20],
    "an id alone": b"\x01",
    "nothing": b"",
    "a public key of zeros": config(Kem.X25519, (HKDF, AES_256), public=bytes(32)),
    "a public key of order 4": config(Kem.X25519, (HKDF, AES_256), public=b"\1" + bytes(31)),
    "X-Wing, its second half zeros": config(Kem.XWING, (HKDF, AES_256), public=HYBRID[:-32] + bytes(32)),
    "X-Wing, a coefficient above the modulus": config(Kem.XWING, (HKDF, AES_256), public=b"\xff" * 3 + HYBRID[3:]),
}  # fmt: skip


def cases() -> dict[str, Any]:
    """The content of the file of connection strings."""
    made: list[Case] = [{"name": name, "text": text} for name, text in STRINGS.items()]
    return {
        "about": "Connection strings. docs/wire.md section 2.", "cases": [case | {"said": check({}, case)} for case in made]
    }  # fmt: skip


def check(_content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a connection string of the file."""
    return said(lambda: b64u(ConnectionString.parse(case["text"]).root))


def config_cases() -> dict[str, Any]:
    """The content of the file of key configurations."""
    made: list[Case] = [{"name": name, "config": packed(data)} for name, data in CONFIGS.items()]
    return {
        "about": "Key configurations, and whether something can be sealed to them. docs/wire.md sections 4 and 5.",
        "cases": [case | {"said": check_config({}, case)} for case in made],
    }


def check_config(_content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a key configuration of the file, and then of its public key. Unknown suites are passed over."""
    data = unpacked(case["config"])
    read = said(lambda: KeyConfig.parse(data).key_id, IN_MESSAGES | {"UnsupportedSuite": ""})
    if "is" not in read:
        return {"is": None} if read["javascript"] == "" else read
    return said(lambda: RequestSealer(KeyConfig.parse(data)).header.suite.aead.value, {"InvalidMessage": "NoUsableKeyError"})
