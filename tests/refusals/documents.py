"""Manifest documents of a hostile gateway: chains of roots, spellings of tokens, keys that fit everything, old manifests.

A case is served one document after the other, with one memory. What is said of the last one counts.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeAlias

from lacre.jose.jws import b64u, b64u_decode, raw_public_key, sign_bytes
from lacre.trust.manifest import MANIFEST_TYP, ROOT_TYP
from lacre.trust.manifest_store import VersionMemory, accept
from refusals.form import Case, Packed, Said, key, packed, said, unpacked
from refusals.statements import DAY, MANIFEST, NOW, STATEMENT, public, written

Step: TypeAlias = "tuple[bytes, float]"  # a document, and when it is served
IDENTITY: Final = bytes([1]) + bytes(31)  # the neutral point: as a public key, it fits a signature of two trivial halves
SMALL_ORDER: Final = {
    "the neutral point": IDENTITY,
    "order 2": (2**255 - 20).to_bytes(32, "little"),
    "order 4": bytes(32),
    "order 8": bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    "the neutral point, above the prime": (2**255 - 18).to_bytes(32, "little"),
    "the neutral point with the other sign": (1 + 2**255).to_bytes(32, "little"),
}
ORDER: Final = 2**252 + 27742317777372353535851937790883648493  # of Ed25519's group


def statement(root: str = "root", next_root: str | None = None, by: Sequence[str] = (), **members: Any) -> list[str]:
    """An entry of `roots`. by: who signs; the roots themselves if empty."""
    claims = {**STATEMENT, "next_root": None if next_root is None else public(next_root), **members}
    signers = by or (root, *(() if next_root is None else (next_root,)))
    return [sign_bytes(written(claims).encode(), key(name), ROOT_TYP) for name in signers]


def manifest(version: int = 5, signer: str = "signer", **members: Any) -> str:
    return sign_bytes(written({**MANIFEST, "ver": version, **members}).encode(), key(signer), MANIFEST_TYP)


def document(*chain: list[str], of: object = None, **members: Any) -> bytes:
    said = {"roots": list(chain) or [statement()], "manifest": manifest() if of is None else of, **members}
    return json.dumps(said, separators=(",", ":")).encode()


def token(header: bytes, payload: bytes, signer: str = "signer") -> str:
    """A JWS under any header, with a true signature."""
    text = f"{b64u(header)}.{b64u(payload)}"
    return f"{text}.{b64u(key(signer).sign(text.encode()))}"


def under(header: str | bytes) -> bytes:
    data = header.encode() if isinstance(header, str) else header
    return document(of=token(data, written(MANIFEST).encode()))


def spelled(change: Callable[[str, str, str], str]) -> bytes:
    return document(of=change(*manifest().split(".")))


def signed_text(text: str, signer: str = "signer") -> str:
    return f"{text}.{b64u(key(signer).sign(text.encode()))}"


def with_signature(change: Callable[[bytes], bytes]) -> bytes:
    head, _, signature = manifest().rpartition(".")
    return document(of=f"{head}.{b64u(change(base64.urlsafe_b64decode(signature + '==')))}")


def scalar_raised(signature: bytes) -> bytes:
    """The same signature, its second half above the group's order."""
    return signature[:32] + (int.from_bytes(signature[32:], "little") + ORDER).to_bytes(32, "little")


def by_nobody(point: bytes) -> bytes:
    """A manifest of a signer whose key is a point of small order, under a signature that needs no private key: its two halves
    are a public key and the secret number behind that, whatever was signed.
    """
    anybody = key("anybody")
    secret = bytearray(hashlib.sha512(anybody.private_bytes_raw()).digest()[:32])
    secret[0], secret[31] = secret[0] & 0xF8, secret[31] & 0x7F | 0x40  # RFC 8032 section 5.1.5
    half = (int.from_bytes(secret, "little") % ORDER).to_bytes(32, "little")
    return document(statement(signer=b64u(point)), of=f"{manifest().rpartition('.')[0]}.{b64u(raw_public_key(anybody) + half)}")


def handovers(*names: str) -> list[list[str]]:
    return [statement(one, other) for one, other in pairwise(names)]


def foreign(count: int) -> list[list[str]]:
    return [statement("stranger", exp=NOW + number) for number in range(count)]


def loose(text: str) -> str:
    """The same bytes in a second spelling of base64url: the last character has bits that no byte needs. One or two of them."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(text) % 4 in {2, 3}
    return text[:-1] + alphabet[alphabet.index(text[-1]) + 1]


def standard() -> str:
    """A manifest whose signature is in base64 with `+` and `/`, where base64url has other characters."""
    tokens = (manifest(iss=f"test {number}") for number in range(99))
    head, _, signature = next(token for token in tokens if {"-", "_"} & set(token.rpartition(".")[2])).rpartition(".")
    return f"{head}.{signature.replace('-', '+').replace('_', '/')}"


def loose_payload(header: str) -> str:
    """A payload in a second spelling, truly signed in that spelling."""
    texts = (written({**MANIFEST, "news": "x" * more}).encode() for more in range(3))
    payload = next(text for text in map(b64u, texts) if len(text) % 4 in {2, 3})
    return signed_text(f"{b64u(header.encode())}.{loose(payload)}")


def repeated(entry: list[str], times: int, *chain: list[str]) -> Packed:
    """A document whose chain begins with so many times the same entry."""
    begun = {"of": json.dumps(entry) + ",", "times": times - (not chain)}
    rest = ",".join(map(json.dumps, chain or [entry]))
    return ['{"roots":[', begun, rest + f'],"manifest":"{manifest()}"' + "}"]


OTHER_ORDER: Final = '{"typ":"lacre-manifest+jwt","alg":"EdDSA"}'
HEADER: Final = '{"alg":"EdDSA","typ":"lacre-manifest+jwt"%s}'
TWO: Final = sign_bytes(
    written({**STATEMENT, "next_root": public("second"), "exp": NOW + 8 * DAY}).encode(), key("second"), ROOT_TYP
)
AFTER: Final = NOW + 2 * DAY  # when a manifest of one day has expired
LATER: Final = {"iat": NOW + 2 * DAY, "exp": NOW + 3 * DAY}

ONCE: Final[dict[str, bytes | Packed]] = {
    "as it should be": document(),
    # the gateway's own keys
    "a signer that nobody named": document(of=manifest(signer="thief")),
    "signed with the gateway's key": document(of=manifest(signer="gateway")),
    "signed with the root": document(of=manifest(signer="root")),
    "its own chain, signer and manifest": document(statement("thief", signer=public("thief")), of=manifest(signer="thief")),
    "a signer past its time": document(statement(exp=NOW)),
    "a signer's last second": document(statement(exp=NOW + 1)),
    "another kind of statement by the signer": document(
        of=sign_bytes(written(MANIFEST).encode(), key("signer"), "lacre-grant+jwt")
    ),
    # changes of root
    "a change of root": document(statement("root", "second"), statement("second")),
    "the next root appoints itself": document(statement("root", "thief", by=["thief", "thief"])),
    "a next root that never agreed": document(statement("root", "thief", by=["root"])),
    "a next root by the signer": document(statement("root", "thief", by=["signer", "thief"])),
    "the two signed different bytes": document([statement("root", "second", by=["root"])[0], TWO]),
    "a gap in the chain": document(statement(), statement("stranger")),
    "a gap, and the root again": document(statement(), statement("stranger"), statement()),
    "the old root speaks after its successor": document(statement("root", "second"), statement("root")),
    "the pinned root leads only `beside`": document(statement("stranger"), beside=[statement()]),
    "`beside` is a stranger's, and `roots` is right": document(statement(), beside=[statement("stranger")]),
    "neither is the pinned root's": document(statement("stranger"), beside=[statement("stranger")]),
    "31 foreign statements first": document(*foreign(31), statement()),
    "999 foreign statements first": repeated(statement("stranger"), 999, statement()),
    "a thousand statements before the root's": repeated(statement("stranger"), 1000, statement()),
    "nothing but foreign statements": repeated(statement("stranger"), 1000),
    "the root within foreign statements": repeated(statement("stranger"), 40, statement(), *foreign(9)),
    "the root among the first of them": repeated(statement("stranger"), 20, statement(), *foreign(9)),
    "the root far within them, named by another": repeated(statement("stranger"), 90, statement("thief", "root"), *foreign(9)),
    # algorithms and headers
    "no algorithm": document(of=under(HEADER.replace("EdDSA", "none") % "").decode().rpartition(".")[0] + "."),
    "HMAC by name": under(HEADER.replace("EdDSA", "HS256") % ""),
    "Ed25519 by its other name": under(HEADER.replace("EdDSA", "Ed25519") % ""),
    "another order of the header": under(OTHER_ORDER),
    "white space in the header": under('{ "alg": "EdDSA", "typ": "lacre-manifest+jwt" }'),
    "a key id in the header": under(HEADER % ',"kid":"1"'),
    "a key id that is a number": under(HEADER % ',"kid":1'),
    "a header that demands an extension": under(HEADER % ',"crit":["exp"],"exp":1'),
    "a header that demands nothing, in a list": under(HEADER % ',"crit":[]'),
    "a header that demands null": under(HEADER % ',"crit":null'),
    "a payload that is not encoded": under(HEADER % ',"b64":false'),
    "a payload that is encoded, as it says": under(HEADER % ',"b64":true'),
    "no typ": under('{"alg":"EdDSA"}'),
    "a typ in capitals": under(HEADER.replace("lacre-manifest", "LACRE-MANIFEST") % ""),
    "a typ with its whole media type": under(HEADER.replace('"lacre', '"application/lacre') % ""),
    "a header twice": under('{"alg":"none","alg":"EdDSA","typ":"lacre-manifest+jwt"}'),
    "a header that is a list": under("[]"),
    "a header that is no JSON": under("EdDSA"),
    "a header with a byte order mark": under(b"\xef\xbb\xbf" + (HEADER % "").encode()),
    "a header in UTF-16": under((HEADER % "").encode("utf-16")),
    "a key in the header": under(HEADER % (',"jwk":{"kty":"OKP","crv":"Ed25519","x":"' + public("thief") + '"}')),
    # spellings
    "padded": spelled(lambda head, body, signature: f"{head}.{body}.{signature}=="),
    "a signature with loose bits": spelled(lambda head, body, signature: f"{head}.{body}.{loose(signature)}"),
    "a signature in standard base64": document(of=standard()),
    "a payload with loose bits, signed": document(of=loose_payload(OTHER_ORDER)),
    "a line break in the signature": spelled(lambda head, body, signature: f"{head}.{body}.{signature[:40]}\n{signature[40:]}"),
    "four parts": spelled(lambda head, body, signature: f"{head}.{body}.{signature}."),
    "two parts": spelled(lambda head, body, _signature: f"{head}.{body}"),
    "no parts": document(of=""),
    "a manifest that is a number": document(of=7),
    "a manifest in JSON form": document(of={"payload": manifest().split(".")[1]}),
    "a payload in UTF-16": document(of=token((HEADER % "").encode(), written(MANIFEST).encode("utf-16"))),
    "a payload that is not UTF-8": document(
        of=token((HEADER % "").encode(), written(MANIFEST).replace("test", "té").encode("latin-1"))
    ),
    "surrogates in UTF-8": document(
        of=token((HEADER % "").encode(), written(MANIFEST).encode().replace(b'"test"', b'"\xed\xa0\x80"'))
    ),
    # signatures
    "a signature of 63 bytes": with_signature(lambda raw: raw[:-1]),
    "a signature of 65 bytes": with_signature(lambda raw: raw + b"\0"),
    "an empty signature": with_signature(lambda _raw: b""),
    "a bit flipped in the first half": with_signature(lambda raw: bytes([raw[0] ^ 1]) + raw[1:]),
    "a bit flipped in the second half": with_signature(lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:]),
    "a second half above the group's order": with_signature(scalar_raised),
    "a first half of small order": with_signature(lambda raw: IDENTITY + raw[32:]),
    **{f"a signer's key: {what}": by_nobody(point) for what, point in SMALL_ORDER.items()},
    # the document
    "an empty document": b"",
    "a document that is a list": b"[]",
    "a document that is null": b"null",
    "a document with a byte order mark": b"\xef\xbb\xbf" + document(),
    "a document in UTF-16": document().decode().encode("utf-16"),
    "a document in UTF-32": document().decode().encode("utf-32-le"),
    "a document that is not UTF-8": document().replace(b'{"roots"', b'{"\xff":0,"roots"'),
    "NaN in a document": document().replace(b'{"roots"', b'{"news":NaN,"roots"'),
    "roots twice": document().replace(b'{"roots"', b'{"roots":[],"roots"'),
    "white space around it": b" \r\n" + document() + b"\t ",
    "something after it": document() + b"{}",
    "JSON that is nested too deep": b'{"roots":' + b"[" * 100_000,
    "a document of exactly 1 MiB": document() + b" " * (2**20 - len(document())),
    "a document of 1 MiB and a byte": document() + b" " * (2**20 - len(document()) + 1),
    "an unknown member": document(news={"of": "a later version"}),
    "a later version of the format": document(v=2),
    "a version of the format that is a text": document(v="1"),
    "the version of the format": document(v=1),
    "no roots": document(roots=[]),
    "roots that are missing": json.dumps({"manifest": manifest()}).encode(),
    "roots that are null": document(roots=None),
    "an entry of no token": document([]),
    "an entry of three tokens": document([*statement("root", "second"), *statement()]),
    "an entry that is a text": document(roots=statement()),
    "an entry of numbers": document([7]),
    "beside is null": document(beside=None),
    "beside is empty": document(beside=[]),
    "beside has an empty entry": document(beside=[[]]),
    "a statement of 4096 characters and more": document(statement(news="x" * 4096)),
    "a foreign statement of 4096 characters and more": document(statement("stranger", news="x" * 4096), statement()),
    "an entry that is no token, before the one that names the root": document(
        ["x"], statement("stranger", "root"), statement()
    ),
    "a statement of the root that is none, and `beside` is right": document(
        [sign_bytes(b"[]", key("root"), ROOT_TYP)], beside=[statement()]
    ),
    "a statement of the root in a later version, and `beside` is right": document(statement(v=2), beside=[statement()]),
    "an entry before the root's that is no token": document(["x"], statement()),
    "a last entry that is no token": document(statement(), ["x"]),
    "an earlier statement with another algorithm": document(
        [token(b'{"alg":"ML-DSA-65","typ":"lacre-root+jwt"}', written(STATEMENT).encode(), "stranger")], statement()
    ),
}
NEW_CHAIN: Final = [*handovers("root", "second"), statement("second")]
AGAIN: Final[dict[str, tuple[list[Step], str]]] = {
    "the same again": ([(document(), NOW), (document(), NOW)], "root"),
    "a newer one": ([(document(), NOW), (document(of=manifest(6)), NOW)], "root"),
    "an older one, while the newer lasts": ([(document(of=manifest(6)), NOW), (document(), NOW)], "root"),
    "an older one, after the newer has expired": (
        [(document(of=manifest(6)), NOW), (document(of=manifest(**LATER)), AFTER + 1)], "root",
    ),
    "the same one, after it has expired": ([(document(), NOW), (document(), AFTER)], "root"),
    "two of one version": ([(document(), NOW), (document(of=manifest(iss="other")), NOW)], "root"),
    "the same one in another document": ([(document(), NOW), (b" " + document(), NOW)], "root"),
    "a statement less": (
        [(document(statement(exp=NOW + DAY), statement()), NOW), (document(statement(exp=NOW + DAY), of=manifest(6)), NOW)],
        "root",
    ),
    "a statement less, after the newer has expired": (
        [(document(statement(exp=NOW + 8 * DAY), statement()), NOW),
         (document(statement(exp=NOW + 8 * DAY), of=manifest(6, **LATER)), AFTER)],
        "root",
    ),
    "a statement more": (
        [(document(), NOW), (document(statement(), statement(exp=NOW + 8 * DAY), of=manifest(6)), NOW)], "root",
    ),
    "another statement in the place of one": (
        [(document(), NOW), (document(statement(exp=NOW + 8 * DAY), of=manifest(6)), NOW)], "root",
    ),
    "the change of root is taken back": ([(document(*NEW_CHAIN), NOW), (document(of=manifest(6)), NOW)], "root"),
    "the change of root is taken back, later": (
        [(document(*NEW_CHAIN), NOW), (document(of=manifest(6, **LATER)), AFTER)], "root",
    ),
    "the new root is pinned, and the chain begins with it": (
        [(document(*NEW_CHAIN), NOW), (document(statement("second"), of=manifest(6)), NOW)], "root second",
    ),
    "the new root is pinned, and the version is older": (
        [(document(*NEW_CHAIN, of=manifest(6)), NOW), (document(*NEW_CHAIN), NOW)], "root second",
    ),
    "the new root is pinned, and the version is older, later": (
        [(document(*NEW_CHAIN, of=manifest(6)), NOW), (document(*NEW_CHAIN, of=manifest(**LATER)), AFTER)], "root second",
    ),
    "the next root is pinned, and the memory is of the old one": (
        [(document(of=manifest(6)), NOW), (document(statement(), *NEW_CHAIN), NOW)], "root second",
    ),
    "the next root is pinned, and the memory is of the old one, later": (
        [(document(of=manifest(6)), NOW), (document(statement(), *NEW_CHAIN, of=manifest(**LATER)), AFTER)], "root second",
    ),
    "another root's memory does not count": (
        [(document(statement("stranger"), of=manifest(9)), NOW), (document(), NOW)], "stranger root",
    ),
}  # fmt: skip


def pins(of: str) -> list[str]:
    """The pinned root of each step."""
    first, _, second = of.partition(" ")
    return [public(first), public(second or first)]


def cases() -> dict[str, Any]:
    """The content of the file."""
    made: list[Case] = []
    for name, served in ONCE.items():
        form = packed(served) if isinstance(served, bytes) else served
        made.append({"name": name, "steps": [{"document": form, "now": NOW, "root": public("root")}]})
    for name, (steps, of) in AGAIN.items():
        each = [{"document": packed(data), "now": now, "root": root} for (data, now), root in zip(steps, pins(of), strict=True)]
        made.append({"name": name, "steps": each})
    judged = [case | {"said": check({}, case)} for case in made]
    return {"about": "Manifest documents. docs/wire.md section 3.", "cases": judged}


def check(_content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a case of the file. Of several steps all but the last one are accepted."""
    memory = VersionMemory()
    *before, last = case["steps"]
    for step in before:
        _accepted(step, memory)
    return said(lambda: _accepted(last, memory))


def _accepted(step: Mapping[str, Any], memory: VersionMemory) -> int:
    return accept(unpacked(step["document"]), b64u_decode(step["root"]), memory, step["now"]).manifest.version
