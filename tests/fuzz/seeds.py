"""Writes `corpus/`: what real encoders make of small messages, so that a search begins behind the first checks.

Run it anew (`PYTHONPATH=tests .venv/bin/python -m fuzz.seeds`) where a format has changed. Files whose name begins with
`found-` are inputs that once broke an invariant: this script leaves them alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from fuzz import answers, backend, fabric, faces, keys, proofs, statements, wire
from lacre.asgi import AUTHORITY
from lacre.jose.jws import b64u, sign
from lacre.trust.chain import ConnectionString
from lacre.wire import bhttp
from lacre.wire.header import Aead, Kdf, Kem, SealedHeader, Suite, encode_key_list
from lacre_fabric.work.frames import Frame, FrameKind

CORPUS: Final = Path(__file__).parent / "corpus"
REQUEST: Final = bhttp.Request(
    "POST", "https", AUTHORITY, "/v1/chat/completions",
    (("content-type", "application/json"), ("date", "Fri, 15 Jan 2027 08:00:00 GMT"), ("lacre-model", "tiny")),
    b'{"model":"tiny"}', (("a", "b"),),
)  # fmt: skip
CHUNK: Final = {"id": "c1", "model": "tiny", "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]}
USAGE: Final = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
EXPLANATION: Final = {
    "id": "e1", "model": "tiny", "answer": "Oslo", "logprob": -1.5, "usage": USAGE,
    "parts": [{"id": "a", "drop": 8.0, "share": 1.0}, {"id": "b", "drop": -0.5, "share": 0.0}],
    "tokens": [{"text": "Os", "bits": 1.5}, {"text": "lo", "bits": 0.0}],
}  # fmt: skip
MESSAGE: Final = {
    "id": "c1", "model": "tiny", "usage": USAGE,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
}  # fmt: skip


def text(content: bytes) -> bytes:
    """As `Script.text` reads it."""
    return len(content).to_bytes(2, "big") + content


def response() -> bytes:
    encoder = bhttp.ResponseEncoder()
    early = encoder.informational(103, (("link", "</a>"),))
    head = encoder.head(200, (("content-type", "text/event-stream"),))
    return early + head + encoder.data(b"data: 1\n\n") + encoder.data(b"data: 2\n\n") + encoder.end((("lacre-receipt", "x"),))


def of_wire() -> Iterator[tuple[str, str, bytes]]:
    no_cuts = b"\x00"
    yield "bhttp_request", "known", bhttp.encode_request(REQUEST, padded_to=256)
    yield "bhttp_request", "indeterminate", bhttp.encode_request_indeterminate(REQUEST)
    yield "bhttp_request", "cut-short", b"\x00\x03GET\x05https\x00\x01/"
    yield "bhttp_response", "indeterminate", b"\x03\x00\x01\x00\x09\x00\x30" + response()
    yield "bhttp_response", "known", no_cuts + b"\x01\x40\xc8\x05\x01a\x01b\x02\x02hi\x00\x00"
    for key in wire.KEYS.values():
        yield "key_config", key.config.kem.label, key.config.encode()
    x25519 = wire.KEYS[1].config.encode()
    unknown = bytes.fromhex("05fffe0000000400010001")
    yield "key_list", "two", encode_key_list([wire.KEYS[1].config, wire.KEYS[1].config])
    yield "key_list", "one-unknown", text(unknown) + text(x25519)
    for kem in Kem:
        outline = b"\x11" + bytes(17) + b"\x00" + bytes(16)
        suite = Suite(kem, Kdf.HKDF_SHA256, Aead.AES_256_GCM)
        yield "header", kem.label, SealedHeader(1, suite, bytes(kem.n_enc)).raw + outline
    record, last = bytes([wire.RECORD]) + text(b"some"), bytes([wire.FINAL]) + text(b"end")
    for target in ("ohttp_request", "ohttp_response"):
        yield target, "whole", no_cuts + bytes([wire.HONEST]) + record + record + last
        yield target, "in-pieces", b"\x02\x00\x07\x00\x33" + bytes([wire.HONEST]) + record + last
        yield target, "long-lengths", no_cuts + bytes([wire.HONEST, wire.LONG_RECORD]) + text(b"some") + last
        yield target, "stray-byte", no_cuts + bytes([wire.HONEST]) + record + bytes([wire.BYTES]) + text(b"\x00") + last
    yield "ohttp_request", "any-bytes", no_cuts + b"\x01" + bytes([wire.BYTES]) + text(wire.HEADER.raw + b"\x11" + bytes(17))


def of_heads() -> Iterator[tuple[str, str, bytes]]:
    no_cuts = b"\x00"
    get = b"GET /v1/models?x=1 HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"
    post = b"POST /v1/sealed HTTP/1.1\r\nHost: x:1\r\nAuthorization: Bearer a.b.c\r\n"
    yield "request_head", "two", no_cuts + b"\r\n" + get + get
    yield "request_head", "length", no_cuts + post + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\nhello" + get
    chunks = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nLacre-Pool: a\r\n\r\n"
    yield "request_head", "chunked", no_cuts + post + chunks + get
    yield "request_head", "in-pieces", b"\x02\x00\x07\x00\x33" + post + chunks
    yield "request_head", "old", no_cuts + b"GET / HTTP/1.0\r\n\r\n"
    yield "request_head", "smuggled", no_cuts + post + b"Content-Length: 5\r\n" + chunks
    yield "request_head", "coded", no_cuts + post + chunks.replace(b"chunked", b"gzip, chunked")
    yield "request_head", "encoded", no_cuts + get.replace(b"models", b"m%6Fdels%2F%C3%A9")


def of_statements() -> Iterator[tuple[str, str, bytes]]:
    payloads = statements.example_payloads()
    yield "manifest", "document", bytes([statements.DOCUMENT]) + answers.DOCUMENT
    yield "manifest", "payload", bytes([statements.PAYLOAD]) + payloads["manifest"]
    yield "manifest", "huge-number", bytes([statements.PAYLOAD]) + payloads["manifest"].replace(b"1800000000.0", b"9" * 320, 1)
    yield "manifest", "statement", bytes([statements.STATEMENT_PAYLOAD]) + payloads["statement"]
    yield "manifest", "change-of-root", bytes([statements.CHANGE_OF_ROOT]) + payloads["change"]
    yield "jws", "token", b"\x00" + sign({"a": 1}, statements.SIGNER, "test+jwt").encode()
    yield "jws", "header-and-payload", b'\x01{"alg":"EdDSA","typ":"test+jwt"}\n{"a":1}'
    yield "jws", "critical", b'\x01{"alg":"EdDSA","typ":"test+jwt","b64":false,"crit":["b64"]}\n{"a":1}'
    for name in ("grant", "receipt"):
        yield name, "payload", b"\x01" + payloads[name]
        yield name, "huge-number", b"\x01" + payloads[name].replace(b"1800000000.0", b"9" * 320, 1)
    yield "grant", "token", b"\x00" + sign(json.loads(payloads["grant"]), statements.SIGNER, "lacre-grant+jwt").encode()
    yield "frame", "data", b"A:" + b"0f" * 16 + b"\nS:12\nK:data\n\nbytes"
    yield "frame", "error", b"A:" + b"0f" * 16 + b"\nS:0\nK:error\n\nhttps://lacre.dev/problems/busy"
    for name, url in (("host", "https://gw.example:8321"), ("loopback", "http://127.0.0.1:1"), ("address", "https://[::1]:1")):
        yield "connection_string", name, str(ConnectionString(url, statements.PINNED)).encode()


def of_answers() -> Iterator[tuple[str, str, bytes]]:
    last = {"id": "c1", "model": "tiny", "choices": [], "usage": USAGE}
    yield "deltas", "stream", "\n".join((json.dumps(CHUNK), json.dumps(last), "[DONE]")).encode()
    yield "deltas", "error", b'{"error":{"message":"m","type":"t","code":"c"}}'
    yield "reply", "answer", b"\x00" + json.dumps(MESSAGE).encode()
    yield "reply", "error", b'\x01{"error":{"message":"m","type":"t","code":"c"}}'
    yield "explanation", "parts", b"\x00" + json.dumps(EXPLANATION).encode()
    lens = {"layers": [0, 5], "tokens": [{"text": "O", "ranks": [9, 1], "probabilities": [0.1, 0.9], "says": ["x", "O"]}]}
    yield "explanation", "lens", b"\x01" + json.dumps({**EXPLANATION, "lens": lens}).encode()
    yield "request_inside", "request", bhttp.encode_request(REQUEST)
    yield "request_inside", "path", b"\x00\x03GET\x05https\x0dlacre.invalid\x0a/v1/%2e./a"
    no_cuts, document, sealed = b"\x00", b"\x00", b"\x00"
    yield "exchange", "answer", document + sealed + bytes([answers.SEALED_ANSWER]) + no_cuts + text(b"Hi")
    yield "exchange", "pieces", document + sealed + bytes([answers.SEALED_BYTES]) + b"\x01\x00\x40" + text(response())
    yield "exchange", "cut", document + sealed + bytes([answers.SEALED_CUT]) + no_cuts + text(response())
    date = text(b"Fri, 15 Jan 2027 08:30:00 GMT")
    date_problem = sealed + bytes([answers.SEALED_DATE]) + no_cuts + date
    yield "exchange", "date", document + date_problem + sealed + bytes([answers.SEALED_ANSWER]) + no_cuts + text(b"Hi")
    unknown_key = text(b'{"type":"https://iana.org/assignments/http-problem-types#ohttp-key"}')
    refused = b"\x0b" + bytes([answers.RAW]) + no_cuts + unknown_key
    yield "exchange", "unknown-key", document + refused + document + sealed + bytes([answers.SEALED_ANSWER]) + no_cuts
    yield "exchange", "manifest", b"\x01" + text(b'{"roots":[["' + b64u(b"{}").encode() + b'.e30.AA"]],"manifest":""}')


def of_proofs() -> Iterator[tuple[str, str, bytes]]:
    entry = b'{"pool":"default","kind":"intent"}'
    proof = proofs.proven(entry)
    longer = replace(proof, index=2, path=(bytes(32), bytes(range(32))))
    yield "audit_header", "header", b"\x00" + proof.header().encode()
    yield "audit_header", "path", b"\x00" + longer.header().encode()
    yield "audit_header", "entry", b"\x01" + text(entry) + b", later=?1"
    yield "audit_file", "proof", proof.text().encode()
    yield "audit_file", "path", longer.text().encode()
    yield "checkpoint", "note", b"\x00" + proof.checkpoint
    yield "checkpoint", "text", b"\x01" + proof.checkpoint.partition(b"\n\n")[0]


def of_fabric() -> Iterator[tuple[str, str, bytes]]:
    no_cuts = b"\x00"
    info = b'INFO {"max_payload":1024}\r\nPING\r\n'
    message = b"HMSG reply.a.g1.x 1 r.x 19 21\r\nNATS/1.0\r\nA: bc\r\n\r\nhi\r\nMSG a 2 0\r\n\r\n"
    yield "nats_stream", "messages", no_cuts + info + message + b"-ERR 'x'\r\n+OK\r\nPONG\r\n"
    yield "nats_stream", "pieces", b"\x03\x00\x05\x00\x31\x00\x40" + info + message
    yield "nats_stream", "form-feed", no_cuts + b"MSG reply.a.g1.x\x0c3 1 2\r\nhi\r\n"
    yield "nats_stream", "too-long", no_cuts + b"MSG a 1 9000000\r\nx"
    yield "nats_headers", "fields", b"\x00NATS/1.0\r\nA: b\r\nC:d\r\n\r\n"
    yield "nats_headers", "status", b"\x01NATS/1.0 404 No Messages\r\nA: b\r\n\r\n"
    beat = fabric.block(Frame(fabric.ATTEMPT, 0, FrameKind.BEAT, b""))
    presence = b'{"models":["m"],"busy":1,"free":1,"keys":["k"]}'
    for name, kind, chosen, headers, payload in (
        ("beat", fabric.TO_A_REQUEST, b"", beat, b""),
        ("stray", fabric.REPLY, b"1" * 32, beat, b""),
        ("subject", fabric.REPLY, b"\xff\x0c2", b"", b"x"),
        ("presence", fabric.SIGN_OF_PRESENCE, b"lacre.n1", b"", presence),
        ("huge-count", fabric.SIGN_OF_PRESENCE, b"lacre.n1", b"", presence.replace(b"1", b"1" * 400)),
        ("odd-status", fabric.TO_THE_LIBRARY, b"x", b"NATS/1.0 \xff\xff\xff\r\n\r\n", b""),
        ("odd-name", fabric.TO_THE_LIBRARY, b"x", b"NATS/1.0 100 x\r\n\xff: x\r\n\r\n", b""),
    ):
        yield "worker_says", name, bytes([kind]) + text(chosen) + text(headers) + text(payload)
    yield "jetstream_says", "ack", b'\x01{"stream":"WORK_a_lacre","seq":7}'
    yield "jetstream_says", "stored", b'\x00{"subject":"x","seq":7,"time":"2026-01-01T00:00:00.123456789Z","data":"aGk="}'


def of_keys() -> Iterator[tuple[str, str, bytes]]:
    found = keys.example_set()
    yield "jwks", "set", found
    yield "jwks", "odd-kid", found.replace(b'"kid":"a"', b'"kid":["a"]')
    yield "jwks", "odd-curve", found.replace(b'"crv":"P-256"', b'"crv":["P-256"]')
    yield "jwks", "odd-exponent", found.replace(b'"AQAB"', b'"' + b"Aw" * 900 + b'"')
    metadata = b'{"issuer":"http://127.0.0.1:1","jwks_uri":"http://127.0.0.1:1/k"}'
    ok, no_fields, one_piece = b"\x00", b"\x00", b"\x00"
    first = ok + no_fields + one_piece + text(metadata)
    tagged = ok + b"\x02\x00\x01" + text(b'"tag"') + text(b"max-age=60") + one_piece + text(found)
    known = b"\x03" + no_fields + one_piece + text(b"")
    yield "issuer", "metadata-and-set", first + tagged + known
    yield "issuer", "odd-tag", first + ok + b"\x01\x00" + text(b"\xff\xfe") + one_piece + text(found) + known


def of_lineages() -> Iterator[tuple[str, str, bytes]]:
    """Kinds of statement: 0 the last again, 1 any text, 2 and 3 a change of root, 4 one without the new root, others none."""
    first, change = b"\x05\x00\x00", b"\x02\x00\x01"
    yield "lineage", "one", b"\x01\x00\x01" + first + b"\x01"
    yield "lineage", "moved", b"\x02\x00\x01" + first + b"\x01\x01\x02" + first + change + b"\x02"
    foreign = b"\x05\x03\x00"
    yield "lineage", "foreign", b"\x01\x01\x04" + foreign + foreign + change + b"\x05\x01\x00" + b"\x01"
    yield "lineage", "any-text", b"\x01\x00\x02" + b"\x01\x00\x00" + text(b"a.b.c") + first + b"\x01"


def of_backend() -> Iterator[tuple[str, str, bytes]]:
    anything = backend.example
    yield "json_schema", "object", anything(type="object", properties={"a": {"type": "string"}}, required=["a"])
    yield "json_schema", "numbers", anything(type="integer", minimum=3, multipleOf=4, enum=[4, 8, 12])
    patterns = {"^a": True, "b$": {"pattern": "x+"}}
    yield "json_schema", "patterns", anything(patternProperties=patterns, additionalProperties=False)
    yield "json_schema", "choice", anything(oneOf=[{"type": "null"}, {"items": {"$ref": "#"}}], unevaluatedItems=False)
    yield "json_schema", "denied", anything(**{"not": {"required": ["a"], "contains": {"const": [1]}}, "$anchor": "x"})
    yield "json_schema", "loose", b"\x01" + anything(uniqueItems=True, format="x", dependentRequired={"a": ["b"]})[1:]
    yield "chat_template", "messages", b"{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}\n{% endfor %}"
    yield "chat_template", "macro", b"{% macro m(x) %}{{ x ~ x }}{% endmacro %}{% set a = m('a') %}{{ m(a) | upper }}"
    doubling = b"{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    yield "chat_template", "doubling", doubling
    yield "chat_template", "nested", b"{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    yield "chat_template", "wide", b"{{ '%99999999s' | format('a') }}{{ 'a' * 99999999 }}{{ 'a'.center(99999999) }}"
    yield "chat_template", "inside", b"{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append.__globals__ }}"


def of_chats() -> Iterator[tuple[str, str, bytes]]:
    ask = {"role": "user", "content": "How is the tide? <|end|>"}
    schema = {"type": "object", "properties": {"port": {"type": "object", "properties": {"name": {"type": "string"}}}}}
    tool = {"type": "function", "function": {"name": "tide", "description": "Now", "parameters": schema}}
    call = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": {"name": "Porto"}}'}}
    called = (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2 m"},
    )
    plain = {"messages": [ask], "max_tokens": 9, "temperature": 0.5, "stop": ["x"], "logit_bias": {"3": 1}}
    yield "chat_request", "plain", json.dumps({"model": "tiny", **plain}).encode()
    tools = {"messages": [ask, *called], "tools": [tool], "tool_choice": "auto"}
    parts = [{"type": "text", "id": "a", "text": "Oslo"}, {"type": "text", "text": "Where?"}]
    explained = {"messages": [{"role": "user", "content": parts}, called[0] | {"content": parts[:1]}, called[1]]}
    explained["messages"][1]["content"] = [{"type": "text", "id": "b", "text": "Rome"}]
    yield "explain_request", "parts", json.dumps({"model": "tiny", "answer": "Oslo", "lens": True, **explained}).encode()
    yield "chat_request", "tools", json.dumps({"model": "tiny", **tools}).encode()


def seeds() -> dict[Path, bytes]:
    """Every seed, by its file."""
    found = (
        *of_wire(), *of_statements(), *of_answers(), *of_proofs(), *of_fabric(), *of_keys(), *of_lineages(), *of_heads(),
        *of_backend(), *of_chats(), *faces.seeds(),
    )  # fmt: skip
    return {CORPUS / target / name.lower(): data for target, name, data in found}


def main() -> None:
    for path in CORPUS.glob("*/*"):
        if not path.name.startswith("found-"):
            path.unlink()
    for path, data in seeds().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(seeds())} seeds in {CORPUS}")


if __name__ == "__main__":
    main()
