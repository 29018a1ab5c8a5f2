"""Defences of the wire: sealed messages, and the Binary HTTP inside them."""

from __future__ import annotations

from typing import Final

from hostile.mutation import Mutation

MUTATIONS: Final = Mutation.of(
    (
        "answers: early_final",
        "the final chunk has an AAD of its own",
        "lacre.wire.chunks",
        '_FINAL: Final = b"final"',
        '_FINAL: Final = b""',
    ),
    (
        "answers: swap",
        "a record's nonce counts it",
        "lacre.wire.hpke:SequencedAead._nonce",
        'return (self._base_nonce ^ self._sequence).to_bytes(12, "big")',
        'return self._base_nonce.to_bytes(12, "big")',
    ),
    (
        "replay: splice",
        "the answer's key is derived from its nonce",
        "lacre.wire.ohttp:response_aead",
        "prk = hpke.extract(header.enc + nonce, secret)",
        "prk = hpke.extract(header.enc, secret)",
    ),
    ("answers: huge_length", "a record is at most 16 KiB", "lacre.wire.framing:_check_length", "if length > MAX_SEALED_CHUNK:"),
    (
        "answers: huge_final_chunk",
        "the final chunk is at most 16 KiB",
        "lacre.wire.framing:Deframer.feed",
        "if self._in_final and len(view) - position > MAX_SEALED_CHUNK:",
    ),
    (
        "answers: empty_record",
        "a record that is not final holds at least one byte",
        "lacre.wire.framing:_check_length",
        "if length <= TAG:",
    ),
    (
        "answers: truncate",
        "an answer without its final chunk is not whole",
        "lacre.wire.framing:Deframer.close",
        "if not self._in_final or len(self._rest) < TAG:",
    ),
    (
        "heads: cut_outside",
        "a gateway walks the chunks to the final one",
        "lacre.wire.header:inspect_request",
        "deframer.close()",
        "",
    ),
    (
        "asked: chunk_flood",
        "a request has a bounded number of chunks",
        "lacre.wire.opening:RequestOpener._start",
        "return ChunkOpener(context.aead, MAX_REQUEST_CHUNKS)",
        "return ChunkOpener(context.aead, None)",
    ),
    (
        "asked: another_kem",
        "a key has one KEM",
        "lacre.wire.opening:RequestOpener._start",
        "if key is None or key.config.kem is not header.suite.kem:",
        "if key is None:",
    ),
    (
        "asked: not_offered",
        "a worker accepts only the suites that its configuration offers",
        "lacre.wire.opening:RequestOpener._start",
        "if not key.config.offers(header.suite):",
    ),
    (
        "asked: tiny_pieces",
        "content has a bounded number of chunks",
        "lacre.wire.bhttp:_Parser._content",
        "if self._request and pieces > MAX_REQUEST_PIECES:",
    ),
    (
        "asked: after_the_end",
        "after a message only zeros follow",
        "lacre.wire.bhttp:_Parser._padding",
        "if padding.count(0) != len(padding):",
    ),
    (
        "asked: content_length",
        "the content has the length that it announces",
        "lacre.wire.bhttp:_Parser._message",
        "if announced not in (None, received) and (self._request or received):",
    ),
    (
        "asked: header_flood",
        "a section has a maximum number of fields",
        "lacre.wire.bhttp:_parse_lines",
        "if len(fields) == MAX_FIELDS:",
    ),
    (
        "asked: two_lengths",
        "two different lengths are refused",
        "lacre.wire.fields:content_length",
        "if len(values) > 1 or not _LENGTH.fullmatch(values[0]):",
        "if not _LENGTH.fullmatch(values[0]):",
    ),
    (
        "asked: transfer_coding",
        "fields of a connection stay outside",
        "lacre.wire.fields:check_field",
        'if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):',
    ),
    (
        "asked: header_splitting",
        "a field's value has no control characters",
        "lacre.wire.fields:check_field",
        "if not _VALUE.fullmatch(value):",
    ),
    (
        "asked: header_splitting",
        "a field's name is a token in small letters",
        "lacre.wire.fields:check_field",
        "if not _NAME.fullmatch(name):",
    ),
    (
        "asked: connect",
        "there is no CONNECT inside the seal",
        "lacre.wire.fields:check_control",
        'if not _METHOD.fullmatch(method) or method == b"CONNECT":',
    ),
)
