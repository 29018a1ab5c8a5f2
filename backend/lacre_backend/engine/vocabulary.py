"""The bytes of each token as text of an answer. It needs no llama.cpp, so it works in every process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lacre_backend.engine.protocol import ControlToken
from lacre_backend.engine.text import TextStream


class Vocabulary:
    """pieces: each token's own bytes; control tokens have none, because an answer cannot contain one as text. ends: the tokens
    that end an answer.
    """

    def __init__(self, pieces: Iterable[bytes], ends: Iterable[int]) -> None:
        self.pieces = list(pieces)
        self.ends = frozenset(ends)

    def speak(self, tokens: Sequence[int], control: Sequence[ControlToken]) -> list[int]:
        """Makes control tokens text in answers, except those that end one. Returns them."""
        literals = {token.id: token.text.encode() for token in control}
        spoken = [token for token in tokens if token in literals and token not in self.ends]
        for token in spoken:
            self.pieces[token] = literals[token]
        return spoken

    def released(self, tokens: Sequence[int], stop: Sequence[str]) -> list[str]:
        """The text that each of these tokens of an answer releases."""
        return TextStream(stop).released(self.pieces[token] for token in tokens)
