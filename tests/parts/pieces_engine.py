"""A scripted engine whose tokens are the pieces of one answer: a token may hold half a code point, or several parts' ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import count

from parts.echo_engine import N_VOCAB
from parts.scripted_engine import ScriptedEngine


class PiecesEngine(ScriptedEngine):
    """pieces: of the answer to any prompt. Their ids follow those of bytes and control tokens, in their order."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__(lambda _: "")
        self._pieces = pieces
        self.model = dataclasses.replace(self.model, n_vocab=N_VOCAB + len(pieces))

    def _piece(self, token: int) -> bytes:
        return self._pieces[token - N_VOCAB] if token >= N_VOCAB else super()._piece(token)

    def _answer(self, prompt: tuple[int, ...]) -> Iterator[int]:
        yield from (number for number, _ in zip(count(N_VOCAB), self._pieces, strict=False))
