"""Chunked Oblivious HTTP, the client's side: seal a request, open its response (draft-ietf-ohai-chunked-ohttp, RFC 9458).

No private key of a worker is ever here; the other side is `opening.py`. Rules:

- Every request is sealed to a fresh encapsulation, and sealing it returns the only object that can open its response.
- A request sealer and a response opener work once; a second use raises AlreadyUsedError.
- There is no plaintext fallback: an unknown suite or key is an error before a byte is sealed.
"""

from __future__ import annotations

from typing import Final

from lacre import errors
from lacre.wire import hpke
from lacre.wire.chunks import ChunkOpener, seal_chunks
from lacre.wire.framing import MAX_CHUNK, TAG
from lacre.wire.header import MAX_REQUEST_CHUNKS, MAX_SEALED_REQUEST, KeyConfig, SealedHeader, Suite

_REQUEST_LABEL: Final = b"message/bhttp chunked request"
_RESPONSE_LABEL: Final = b"message/bhttp chunked response"


def request_info(header: SealedHeader) -> bytes:
    """HPKE's `info` for a request: it binds the key id and the suite to the keys (chunked OHTTP section 6.1)."""
    return _REQUEST_LABEL + b"\x00" + header.identifiers


def response_nonce_length(suite: Suite) -> int:
    return max(suite.aead.n_nonce, suite.aead.n_key)


def response_secret(context: hpke.Context, suite: Suite) -> bytes:
    return context.export(_RESPONSE_LABEL, response_nonce_length(suite))


def response_aead(header: SealedHeader, secret: bytes, nonce: bytes) -> hpke.SequencedAead:
    """The key of a response, from the secret that both sides exported (chunked OHTTP section 6.2)."""
    aead = header.suite.aead
    prk = hpke.extract(header.enc + nonce, secret)
    return hpke.SequencedAead(aead, hpke.expand(prk, b"key", aead.n_key), hpke.expand(prk, b"nonce", aead.n_nonce))


class RequestSealer:
    """Seals one request to a key configuration, piece by piece. `header` is the part that a relay will see.

    Raises UnsupportedSuite if the configuration does not offer `suite`, InvalidMessage if its key is invalid.
    """

    __slots__ = ("_chunks", "_context", "_prefix", "_size", "header")

    def __init__(self, config: KeyConfig, suite: Suite | None = None) -> None:
        suite = suite or config.suite()
        if not config.offers(suite):
            raise errors.UnsupportedSuite("the key configuration does not offer this suite; leave the choice to it")
        self._start(config, suite, *hpke.encapsulate(config.kem, config.public_key))

    def _start(self, config: KeyConfig, suite: Suite, shared_secret: bytes, enc: bytes) -> None:
        self.header = SealedHeader(config.key_id, suite, enc)
        self._context: hpke.Context | None = hpke.Context(suite, shared_secret, request_info(self.header))
        self._prefix = self.header.raw
        self._size = len(self._prefix)
        self._chunks = 0

    def seal(self, piece: bytes) -> bytes:
        """The sealed bytes of `piece`; the first call's begin with the header. Raises MessageTooLarge past 7 MiB."""
        context = self._open_context()
        self._account(len(piece), final=False)
        prefix, self._prefix = self._prefix, b""
        return seal_chunks(context.aead, piece, final=False, prefix=prefix)

    def finish(self, piece: bytes = b"") -> tuple[bytes, ResponseOpener]:
        """The rest of the sealed request, its final chunk last, and the opener of its response."""
        context = self._open_context()
        self._account(len(piece), final=True)
        self._context = None
        sealed = seal_chunks(context.aead, piece, final=True, prefix=self._prefix)
        return sealed, ResponseOpener(self.header, response_secret(context, self.header.suite))

    def _open_context(self) -> hpke.Context:
        if self._context is None:
            raise errors.AlreadyUsedError("this request is sealed already; make a new sealer for the next one")
        return self._context

    def _account(self, length: int, *, final: bool) -> None:
        """Refuses what the other side would refuse, before any of it is sealed."""
        chunks = max(-(-length // MAX_CHUNK), int(final))
        # A length prefix has at most 4 bytes, so this may refuse a request a few bytes early, never late.
        self._size += length + chunks * (4 + TAG)
        self._chunks += chunks
        if self._size > MAX_SEALED_REQUEST:
            raise errors.MessageTooLarge("the request would be larger than 7 MiB when sealed; send a smaller one")
        if self._chunks + (not final) > MAX_REQUEST_CHUNKS:
            raise errors.MessageTooLarge("the request has too many chunks; seal it in larger pieces")


def seal_request(config: KeyConfig, plaintext: bytes, suite: Suite | None = None) -> tuple[bytes, SealedHeader, ResponseOpener]:
    """A whole sealed request, its header, and the opener of its response."""
    sealer = RequestSealer(config, suite)
    sealed, opener = sealer.finish(plaintext)
    return sealed, sealer.header, opener


class ResponseOpener:
    """Opens the response to one sealed request, as it arrives. Every record it returns is authentic and in order. Only after
    `close` has returned is it known that they are *all* of the answer.

    Memory: at most one chunk is held.
    """

    __slots__ = ("_chunks", "_closed", "_header", "_nonce", "_secret", "complete")

    def __init__(self, header: SealedHeader, secret: bytes) -> None:
        self._header = header
        self._secret = secret
        self._nonce = b""
        self._chunks: ChunkOpener | None = None
        self._closed = False
        self.complete = False

    def feed(self, data: bytes) -> list[bytes]:
        """The plaintexts of the records that `data` completes.

        Raises OpenError, InvalidMessage or MessageTooLarge, and AlreadyUsedError after `close` or an error.
        """
        if self._closed:
            raise errors.AlreadyUsedError("this response was read to its end; seal a new request for another")
        if self._chunks is None:
            missing = response_nonce_length(self._header.suite) - len(self._nonce)
            self._nonce += data[:missing]
            if len(data) < missing:
                return []
            data = data[missing:]
            self._chunks = ChunkOpener(response_aead(self._header, self._secret, self._nonce))
            self._secret = b""
        return self._chunks.feed(data)

    def close(self) -> list[bytes]:
        """The body has ended: opens its final chunk. Raises TruncatedStream if it is missing, OpenError if it is not final."""
        if self._closed:
            raise errors.AlreadyUsedError("this response was closed already")
        self._closed = True
        if self._chunks is None:
            raise errors.TruncatedStream("the sealed response ended before its first record; nothing was read")
        pieces = self._chunks.close()
        self.complete = True
        return pieces
