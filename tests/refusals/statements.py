"""Signed statements whose members are missing, of another type or out of range: manifests, root statements, receipts.

A case is an edit of a statement that both SDKs accept, and its own true signature.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from lacre.evidence import receipts
from lacre.evidence.receipts import TRAILER
from lacre.jose.jws import b64u, raw_public_key, sign_bytes
from lacre.trust.manifest import MANIFEST_TYP, ROOT_TYP
from lacre.trust.manifest_store import VersionMemory, accept
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from refusals.form import Case, Said, edit, edited, key, said

NOW: Final = 1_800_000_000
DAY: Final = 86400
POOL_KEY: Final = PrivateKey.derive(3, Kem.X25519, bytes(32))
DIGEST: Final = bytes(range(32))  # of the request that the receipts are for
CEILING: Final = 512
MISSING: Final = object()


def public(name: str) -> str:
    return b64u(raw_public_key(key(name)))


MODEL: Final = {
    "sha256": ["77" * 32], "signers": ["66" * 32], "kind": "generate", "context": 8192, "max_output": 1024,
    "modalities": ["text"], "tools": "hermes",
}  # fmt: skip
MANIFEST: Final[dict[str, Any]] = {
    "iss": "test", "ver": 5, "iat": NOW, "exp": NOW + DAY, "gateway_key": public("gateway"),
    "pools": {
        "default": {
            "models": {"tiny": MODEL},
            "default_model": "tiny",
            "keys": [{"config": b64u(POOL_KEY.config.encode()), "not_after": NOW + DAY, "receipt_key": public("receipts")}],
            "receipt_key": public("receipts"),
            "shapes": ["pad", "none"],
            "past_receipts": [{"key": public("past"), "until": NOW}],
        },
    },
    "routes": {"assistant": {"pools": [{"pool": "default", "model": "tiny", "share": 1}], "sticky": True}},
    "other_gateway_keys": [public("other gateway")],
}  # fmt: skip
STATEMENT: Final[dict[str, Any]] = {
    "typ": "lacre-root", "signer": public("signer"), "exp": NOW + 9 * DAY, "next_root": None,
}  # fmt: skip
RECEIPT: Final[dict[str, Any]] = {
    "enc": b64u(DIGEST), "model": "sha256:" + "77" * 32, "prompt_tokens": 7, "cached_tokens": 2, "completion_tokens": 3,
    "start": NOW, "end": NOW + 1.5, "final": True,
}  # fmt: skip
OF: Final = {
    "manifest": (MANIFEST, MANIFEST_TYP, "signer"),
    "root statement": (STATEMENT, ROOT_TYP, "root"),
    "receipt": (RECEIPT, receipts.TYP, "receipts"),
}

# By what a value is, in place of the one that is right. Numbers that JavaScript cannot tell apart, such as 1 and 1.0, are not
# among them: JSON makes no difference (RFC 8259 section 6).
OTHERS: Final = {
    "missing": MISSING, "null": None, "true": True, "a text": "text", "an empty text": "", "7": 7, "-1": -1, "1.5": 1.5,
    "2^53": 2**53, "a list": [], "a list of a number": [7], "an object": {},
}  # fmt: skip
VERSIONS: Final = {"1": 1, "2": 2, "0": 0, "true": True, "a text": "1", "null": None, "1.5": 1.5}
BY_HAND: Final[dict[str, list[tuple[str, str, Any]]]] = {
    "manifest": [
        ("nine other gateway keys", "other_gateway_keys", [public(f"gateway {number}") for number in range(9)]),
        ("a gateway key of 31 bytes", "gateway_key", b64u(bytes(31))),
        ("a gateway key in padded base64", "gateway_key", public("gateway") + "="),
        ("a gateway key in standard base64", "gateway_key", "+" * 43),
        ("a default model that is none", "pools.default.default_model", "other"),
        ("no models", "pools.default.models", {}),
        ("a model's digest in capitals", "pools.default.models.tiny.sha256", ["AB" * 32]),
        ("a model's digest with its prefix", "pools.default.models.tiny.sha256", ["sha256:" + "77" * 32]),
        ("a signer of 63 digits", "pools.default.models.tiny.signers", ["6" * 63]),
        ("a kind of a later version", "pools.default.models.tiny.kind", "transcribe"),
        ("a context of 0 tokens", "pools.default.models.tiny.context", 0),
        ("a context of 2^31 tokens", "pools.default.models.tiny.context", 2**31),
        ("nine modalities", "pools.default.models.tiny.modalities", ["text"] * 9),
        ("a modality in capitals", "pools.default.models.tiny.modalities", ["Text"]),
        ("a word with a line break", "pools.default.models.tiny.tools", "hermes\n"),
        ("a word of 33 characters", "pools.default.models.tiny.tools", "h" * 33),
        ("a key of an unknown KEM", "pools.default.keys.0.config", b64u(b"\x01\xff\xff" + bytes(40))),
        ("a key configuration that is cut short", "pools.default.keys.0.config", b64u(POOL_KEY.config.encode()[:-1])),
        ("a key configuration with a byte too much", "pools.default.keys.0.config", b64u(POOL_KEY.config.encode() + b"\0")),
        ("257 routes", "routes", {f"r{number}": MANIFEST["routes"]["assistant"] for number in range(257)}),
        ("a route without a pool", "routes.assistant.pools", []),
        ("a route with nine pools", "routes.assistant.pools", [{"pool": f"p{number}"} for number in range(9)]),
        ("a route that names a pool's model twice", "routes.assistant.pools", [{"pool": "a"}, {"pool": "a"}]),
        ("a share above a million", "routes.assistant.pools.0.share", 10**6 + 1),
        ("a pool's name with a space", "routes.assistant.pools.0.pool", "a b"),
        ("a pool's name with a line break", "routes.assistant.pools.0.pool", "a\n"),
        ("a pool's name of 129 characters", "routes.assistant.pools.0.pool", "a" * 129),
        ("a route's name beyond ASCII", "routes", {"ä": MANIFEST["routes"]["assistant"]}),
        ("a time of hundreds of digits", "exp", int("9" * 400)),
        ("issued 299 s ahead", "iat", NOW + 299),
        ("issued 301 s ahead", "iat", NOW + 301),
        ("expired just now", "exp", NOW),
        ("an unknown member", "news", {"of": ["a later version"]}),
        ("a member that objects have in JavaScript", "pools.__proto__", MANIFEST["pools"]["default"]),
        ("a model that objects have in JavaScript", "pools.default.default_model", "constructor"),
    ],
    "root statement": [
        ("a signer of 33 bytes", "signer", b64u(bytes(33))),
        ("a next root that signed nothing", "next_root", public("next root")),
        ("the root itself as the next one", "next_root", public("root")),
        ("expired just now", "exp", NOW),
        ("another kind of statement", "typ", "lacre-manifest"),
        ("an unknown member", "news", 1),
    ],
    "receipt": [
        ("for another request", "enc", b64u(bytes(32))),
        ("for the same request in padded base64", "enc", b64u(DIGEST) + "="),
        ("not the final one", "final", False),
        ("exactly the ceiling", "completion_tokens", CEILING),
        ("above the ceiling", "completion_tokens", CEILING + 1),
        ("more cached tokens than the prompt has", "cached_tokens", 8),
        ("of another file", "model", "sha256:" + "66" * 32),
        ("of no file", "model", ""),
        ("an unknown member", "news", 1),
    ],
}  # fmt: skip


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Where a member or an entry is, as `pools.default.keys.0`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inside:
        yield f"{path}{name}"
        yield from paths(each, f"{path}{name}.")


def with_other(value: Any, path: str, other: Any) -> Any:
    """A copy with another value at the path."""
    name, _, rest = path.partition(".")
    if isinstance(value, list):
        place = int(name)
        new = [with_other(value[place], rest, other)] if rest else [] if other is MISSING else [other]
        return [*value[:place], *new, *value[place + 1 :]]
    if rest:
        return {**value, name: with_other(value[name], rest, other)}
    kept = {**value, name: other}
    return {each: kept[each] for each in kept if kept[each] is not MISSING}


def written(claims: Mapping[str, Any]) -> str:
    return json.dumps(claims, separators=(",", ":"))


def signed(of: str, payload: str) -> str:
    _, typ, signer = OF[of]
    return sign_bytes(payload.encode(), key(signer), typ)


def document(manifest: str, statement: str) -> bytes:
    return json.dumps({"roots": [[statement]], "manifest": manifest}, separators=(",", ":")).encode()


def judged(of: str, token: str) -> Said:
    """What the SDK says of one statement in its place."""
    if of == "receipt":
        return said(lambda: _receipt(token))
    manifest, statement = (
        token if name == of else signed(name, written(OF[name][0])) for name in ("manifest", "root statement")
    )
    root = raw_public_key(key("root"))
    return said(lambda: accept(document(manifest, statement), root, VersionMemory(), NOW).manifest.version)


def _receipt(token: str) -> int:
    receipt = receipts.of_answer([(TRAILER, token)], raw_public_key(key("receipts")), DIGEST, CEILING)
    receipts.check_model(receipt, "tiny", [RECEIPT["model"]], ran=True)
    return receipt.completion_tokens


def changes(of: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case's name, and its claims."""
    claims = OF[of][0]
    yield "as it should be", claims
    for path in paths(claims):
        for what, other in OTHERS.items():
            changed = with_other(claims, path, other)
            if changed != claims:
                yield f"{path} is {what}", changed
    for what, version in VERSIONS.items():
        yield f"format version {what}", {**claims, "v": version}
    for name, path, other in BY_HAND[of]:
        yield name, with_other(claims, path, other)


def texts(of: str) -> Iterator[tuple[str, str]]:
    """Payloads that no writer of JSON would make."""
    usual = written(OF[of][0])
    yield "a member twice, the same", usual[:-1] + f',"{next(iter(OF[of][0]))}":{json.dumps(next(iter(OF[of][0].values())))}}}'
    yield "NaN", usual[:-1] + ',"news":NaN}'
    yield "infinity", usual[:-1] + ',"news":Infinity}'
    yield "a byte order mark", "\ufeff" + usual
    yield "white space", f" \n{usual}\t "
    yield "half a pair of surrogates", usual[:-1] + ',"news":"\\ud800"}'
    yield "a control character in a text", usual[:-1] + ',"news":"\x01"}'
    yield "something after it", usual + "{}"
    yield "a list", "[]"
    yield "nothing", ""


def cases() -> dict[str, Any]:
    """The content of the file."""
    made: list[Case] = []
    for of, (claims, _, _) in OF.items():
        usual = written(claims)
        for name, payload in [*((name, written(each)) for name, each in changes(of)), *texts(of)]:
            token = signed(of, payload)
            made.append(
                {
                    "name": name,
                    "of": of,
                    "edit": edit(usual, payload),
                    "signature": token.rpartition(".")[2],
                    "said": judged(of, token),
                }
            )
    return {
        "about": "Edits of signed statements. docs/wire.md sections 3 and 11.",
        "root": public("root"), "receipt_key": public("receipts"), "now": NOW, "digest": DIGEST.hex(), "ceiling": CEILING,
        "statements": {of: {"header": signed(of, "").partition(".")[0], "payload": written(OF[of][0]),
                            "signature": signed(of, written(OF[of][0])).rpartition(".")[2]} for of in OF},
        "cases": made,
    }  # fmt: skip


def check(content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a case of the file."""
    statement = content["statements"][case["of"]]
    payload = edited(statement["payload"], case["edit"])
    return judged(case["of"], f"{statement['header']}.{b64u(payload.encode())}.{case['signature']}")
