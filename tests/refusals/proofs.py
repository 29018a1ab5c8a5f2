"""The gateway's proofs that it recorded a request: the header `Lacre-Audit`, bent in each of its parts.

Every log, note and path here is really made and signed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from lacre.evidence import audit_proof, checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import b64u, b64u_decode, raw_public_key
from refusals.form import Case, Packed, Said, key, packed, said, unpacked
from refusals.statements import public

ORIGIN: Final = "test/audit/g1"
ENC: Final = b64u(bytes(range(32)))
ENTRY: Final[dict[str, Any]] = {
    "kind": "intent", "subject": "alice", "issuer": "https://issuer.example", "enc": ENC, "pool": "default", "model": "tiny",
    "action": "chat", "max_tokens": 1, "shape": "pad", "kem": "X25519", "sealed_bytes": 4152, "decision": "allow",
}  # fmt: skip
KEYS: Final = [public("gateway"), public("other gateway")]


def entry_of(**members: Any) -> bytes:
    return json.dumps({**ENTRY, **members}).encode()


def tree(entry: bytes, size: int, place: int) -> tuple[merkle.Path, bytes]:
    """The path of the entry in a log of so many, and the log's root."""
    leaves = [merkle.leaf_hash(entry if number == place else b"%d" % number) for number in range(size)]
    levels = [leaves]
    while len(levels[-1]) > 1:
        last = levels[-1]
        levels.append([merkle.node_hash(last[at], last[at + 1]) for at in range(0, len(last) - 1, 2)])
    path = merkle.inclusion_proof(place, size, lambda level, index: levels[level][index])
    frontier = merkle.Frontier()
    for leaf in leaves:
        list(frontier.grow(leaf))
    return path, frontier.root()


def proof(entry: bytes, size: int = 1, place: int = 0, by: str = "gateway", origin: str = ORIGIN) -> AuditProof:
    path, root = tree(entry, size, place)
    return AuditProof(entry, place, path, note(Checkpoint(origin, size, root), by))


def note(checkpoint: Checkpoint, by: str) -> bytes:
    signer = key(by)
    return checkpoint.sign(signer, checkpoints.key_id(checkpoint.origin, raw_public_key(signer)))


def text_note(text: bytes, by: str = "gateway", origin: str = ORIGIN) -> bytes:
    """A note over any text, truly signed."""
    signer = key(by)
    signature = base64.b64encode(checkpoints.key_id(origin, raw_public_key(signer)) + signer.sign(text)).decode()
    return text + f"\n— {origin} {signature}\n".encode()


def loose(text: str) -> str:
    """The same bytes in a second spelling of base64, if the text has padding."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    bare = text.rstrip("=")
    assert bare != text
    return bare[:-1] + alphabet[alphabet.index(bare[-1]) + 1] + text[len(bare) :]


HONEST: Final = proof(entry_of())
LINE: Final = HONEST.checkpoint.decode().rpartition("\n\n")[2]
TEXT: Final = HONEST.checkpoint.decode().rpartition("\n\n")[0] + "\n"
SEVEN: Final = proof(entry_of(), 7, 4)
WITNESS: Final = "— witness.example/w1 " + base64.b64encode(bytes(68)).decode() + "\n"
OTHERS_LINE: Final = proof(entry_of(), by="thief").checkpoint.decode().rpartition("\n\n")[2]


def with_lines(*lines: str) -> str:
    return replace(HONEST, checkpoint=f"{TEXT}\n{''.join(lines)}".encode()).header()


def bad_line() -> str:
    """A line of the gateway's own key whose signature does not hold."""
    name, _, encoded = LINE.removeprefix("— ").strip().partition(" ")
    blob = base64.b64decode(encoded)
    return f"— {name} {base64.b64encode(blob[:-1] + bytes([blob[-1] ^ 1])).decode()}\n"


def header(change: Callable[[str], str], of: AuditProof = HONEST) -> str:
    return change(of.header())


def member(name: str, value: str) -> str:
    """The honest header with another value of one member."""
    said = dict(each.split("=", 1) for each in HONEST.header().split(", "))
    return ", ".join(f"{each}={value if each == name else said[each]}" for each in said)


def padded_entry() -> bytes:
    return next(entry for entry in (entry_of(news="x" * more) for more in range(3)) if len(entry) % 3)


def loose_entry() -> str:
    """An entry in a second spelling of its bytes."""
    text = base64.b64encode(padded_entry()).decode()
    return proof(padded_entry()).header().replace(text, loose(text))


def loose_note() -> str:
    """A checkpoint in a second spelling of its bytes."""
    for more in ("", "x\n", "xx\n"):
        note = text_note(f"{TEXT}{more}".encode())
        text = base64.b64encode(note).decode()
        if text.endswith("="):
            return replace(HONEST, checkpoint=note).header().replace(text, loose(text))
    raise AssertionError


def texted(lines: str) -> str:
    return replace(HONEST, checkpoint=text_note(lines.encode())).header()


def raw(entry: str | bytes) -> str:
    return proof(entry.encode() if isinstance(entry, str) else entry).header()


ROOT: Final = TEXT.split("\n")[2]
JSON: Final = entry_of().decode()
HEADERS: Final[dict[str, str]] = {
    "as it should be": HONEST.header(),
    "by the gateway's other key": proof(entry_of(), by="other gateway").header(),
    "in a log of seven": SEVEN.header(),
    "the last of seven": proof(entry_of(), 7, 6).header(),
    "the first of eight": proof(entry_of(), 8).header(),
    "no header": "",
    "of another key": proof(entry_of(), by="thief").header(),
    # what was recorded
    **{
        f"another {name}": raw(entry_of(**{name: value}))
        for name, value in {
            "enc": b64u(bytes(32)),
            "pool": "other",
            "model": "large",
            "action": "embed",
            "max_tokens": 2,
            "shape": "none",
            "kem": "MLKEM768-X25519",
            "sealed_bytes": 4153,
            "decision": "deny",
            "kind": "outcome",
            "subject": "mallory",
            "issuer": "https://other.example",
        }.items()
    },
    "a ceiling that is `true`": raw(entry_of(max_tokens=True)),
    "a ceiling that is a text": raw(entry_of(max_tokens="1")),
    "a ceiling that is null": raw(entry_of(max_tokens=None)),
    "an unknown member": raw(entry_of(news=1)),
    **{
        f"without {name}": raw(json.dumps({each: ENTRY[each] for each in ENTRY if each != name}))
        for name in ("enc", "kind", "decision")
    },
    "a member twice": raw(JSON[:-1] + ', "kind": "intent"}'),
    "a member twice, in two spellings": raw(JSON[:-1] + ', "k\\u0069nd": "intent"}'),
    "a member twice, further inside": raw(JSON[:-1] + ', "news": {"a": 1, "a": 2}}'),
    "a member twice, inside a list": raw(JSON[:-1] + ', "news": [[{"a": 1, "a": 2}]]}'),
    "the same member in two objects": raw(JSON[:-1] + ', "news": [{"a": 1}, {"a": 2}]}'),
    "a text with braces and colons": raw(JSON[:-1] + ', "news": "{\\"a\\":1,\\"a\\":2} \\\\"}'),
    "an entry that is a list": raw("[]"),
    "an entry that is no JSON": raw("intent"),
    "an empty entry": raw(""),
    "NaN in the entry": raw(JSON[:-1] + ', "news": NaN}'),
    "a byte order mark": raw(b"\xef\xbb\xbf" + entry_of()),
    "an entry in UTF-16": raw(JSON.encode("utf-16")),
    "an entry that is not UTF-8": raw(JSON.replace("alice", "alicé").encode("latin-1")),
    # the tree
    "another index": replace(SEVEN, index=3).header(),
    "an index outside the tree": replace(HONEST, index=1).header(),
    "a path too short": replace(SEVEN, path=SEVEN.path[:-1]).header(),
    "a path too long": replace(SEVEN, path=(*SEVEN.path, bytes(32))).header(),
    "a path that needs none": replace(HONEST, path=(bytes(32),)).header(),
    "a path in another order": replace(SEVEN, path=SEVEN.path[::-1]).header(),
    "an inner node as the entry": replace(
        HONEST, entry=b"\0" + entry_of(), checkpoint=note(Checkpoint(ORIGIN, 1, merkle.leaf_hash(entry_of())), "gateway")
    ).header(),
    "a size of 2^40": replace(HONEST, checkpoint=note(Checkpoint(ORIGIN, 2**40, bytes(32)), "gateway")).header(),
    "a size above 2^40": replace(HONEST, checkpoint=note(Checkpoint(ORIGIN, 2**40 + 1, bytes(32)), "gateway")).header(),
    # the header
    "another order": ", ".join(HONEST.header().split(", ")[::-1]),
    "no white space": HONEST.header().replace(", ", ","),
    "tabs": HONEST.header().replace(", ", "\t,\t"),
    "an unknown member of the header": HONEST.header() + ", news=?1",
    "a member of the header twice, the last one right": "index=9, " + HONEST.header(),
    "a member of the header twice, the last one wrong": HONEST.header() + ", index=9",
    **{
        f"no {name}": ", ".join(each for each in HONEST.header().split(", ") if not each.startswith(name))
        for name in ("index", "entry", "path", "checkpoint")
    },
    "an index with a zero before it": member("index", "00"),
    "an index with a sign": member("index", "+0"),
    "an index of 16 digits": member("index", "1000000000000000"),
    "an index in other digits": member("index", "٠"),
    "an entry without colons": member("entry", HONEST.header().split("entry=:")[1].split(":")[0]),
    "an entry in base64url": member("entry", f":{b64u(entry_of(news='???>>>'))}:"),
    "an entry without its padding": proof(padded_entry()).header().replace("=:,", ":,").replace("=:,", ":,"),
    "an entry with loose bits": loose_entry(),
    "a checkpoint with loose bits": loose_note(),
    "a line break in the entry": HONEST.header().replace("entry=:", "entry=:\n"),
    "a path of 33 bytes": member("path", f":{base64.b64encode(bytes(33)).decode()}:"),
    "a path of 41 hashes": member("path", f":{base64.b64encode(bytes(41 * 32)).decode()}:"),
    "8192 characters": HONEST.header() + ", " + "x" * (8192 - len(HONEST.header()) - 2),
    "8193 characters": HONEST.header() + ", " + "x" * (8193 - len(HONEST.header()) - 2),
    # the note
    "a witness's line before": with_lines(WITNESS, LINE),
    "a witness's line after": with_lines(LINE, WITNESS),
    "another key's line before": with_lines(OTHERS_LINE, LINE),
    "a bad line of the key, and a good one after it": with_lines(bad_line(), LINE),
    "a good line of the key, and a bad one after it": with_lines(LINE, bad_line()),
    "a line that is no base64 after the good one": with_lines(LINE, "— witness ???\n"),
    "a line that is no base64 before the good one": with_lines("— witness ???\n", LINE),
    "a line without a name": with_lines(LINE, "— \n"),
    "a line of a name alone": with_lines(LINE, "— witness\n"),
    "a line that does not begin with a dash": with_lines(LINE, "- witness AAAA\n"),
    "a short signature of a witness": with_lines(LINE, "— witness AAAA\n"),
    "a signature with loose bits": with_lines(loose(LINE.strip()) + "\n"),
    "no lines": with_lines(),
    "a last line without its end": with_lines(LINE.strip()),
    "another name in the line": with_lines(LINE.replace(ORIGIN, "test/audit/g2")),
    "extension lines": texted(f"{ORIGIN}\n1\n{ROOT}\nmore\nand more\n"),
    "an empty line within": texted(f"{ORIGIN}\n1\n{ROOT}\nmore\n\nand more\n"),
    "two lines alone": texted(f"{ORIGIN}\n1\n"),
    "a size with a zero before it": texted(f"{ORIGIN}\n01\n{ROOT}\n"),
    "a size with a sign": texted(f"{ORIGIN}\n+1\n{ROOT}\n"),
    "a root of 31 bytes": texted(f"{ORIGIN}\n1\n{base64.b64encode(bytes(31)).decode()}\n"),
    "a root with loose bits": texted(f"{ORIGIN}\n1\n{loose(ROOT)}\n"),
    "a root without its padding": texted(f"{ORIGIN}\n1\n{ROOT.rstrip('=')}\n"),
    "an origin with a space": replace(HONEST, checkpoint=text_note(f"a b\n1\n{ROOT}\n".encode(), origin="a b")).header(),
    "an origin with a plus": replace(HONEST, checkpoint=text_note(f"a+b\n1\n{ROOT}\n".encode(), origin="a+b")).header(),
    "an empty origin": replace(HONEST, checkpoint=text_note(f"\n1\n{ROOT}\n".encode(), origin="")).header(),
    "an origin beyond ASCII": replace(HONEST, checkpoint=text_note(f"ä\n1\n{ROOT}\n".encode(), origin="ä")).header(),
    "another origin, truly signed": proof(entry_of(), origin="test/audit/g2").header(),
    "carriage returns": texted(f"{ORIGIN}\r\n1\r\n{ROOT}\r\n"),
    "a tab in an extension": texted(f"{ORIGIN}\n1\n{ROOT}\na\tb\n"),
    "a delete character in an extension": texted(f"{ORIGIN}\n1\n{ROOT}\na\x7fb\n"),
    "a note that is not UTF-8": replace(HONEST, checkpoint=text_note(f"{ORIGIN}\n1\n{ROOT}\n".encode() + b"\xff\n")).header(),
    "an empty note": replace(HONEST, checkpoint=b"").header(),
}


def cases() -> dict[str, Any]:
    """The content of the file."""
    content = {
        "about": "Values of the header Lacre-Audit. docs/wire.md section 12, docs/audit.md.", "keys": KEYS, "expected": ENTRY,
    }  # fmt: skip
    made: list[Case] = [{"name": name, "header": packed(value.encode())} for name, value in HEADERS.items()]
    return content | {"cases": [case | {"said": check(content, case)} for case in made]}


def check(content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a case of the file."""
    keys = [b64u_decode(each) for each in content["keys"]]
    return said(lambda: audit_proof.of_answer(_text(case["header"]), keys, content["expected"]).index)


def _text(value: Packed) -> str:
    return unpacked(value).decode()
