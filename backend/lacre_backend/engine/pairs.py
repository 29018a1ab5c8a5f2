"""The form in which a reranker reads a query and a document as one text, as in llama.cpp's own server.

It is the template `rerank` of the model's file, if it has one. Otherwise the vocabulary's beginning, separator and end stand
around both. The texts themselves become plain tokens: none of them is a control token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import llama_cpp as L

from lacre_backend.engine.protocol import PairPart

_NAMES: Final = re.compile(r"(\{query\}|\{document\})")
_PARTS: Final = {"{query}": PairPart.QUERY, "{document}": PairPart.DOCUMENT}

Words = Callable[[str, bool], list[int]]


def pair_form(pointer: Any, words: Words) -> tuple[PairPart | tuple[int, ...], ...]:
    """pointer: llama.cpp's model. words: tokenizes a text; the flag says whether control tokens are recognized in it."""
    template = L.llama_model_chat_template(pointer, b"rerank")
    if template is None:
        return tuple(part for part in _usual(L.llama_model_get_vocab(pointer)) if part != ())
    pieces = _NAMES.split(template.decode("utf-8", "replace"))
    return tuple(_PARTS.get(piece) or tuple(words(piece, True)) for piece in pieces if piece)


def _usual(vocab: Any) -> Iterator[PairPart | tuple[int, ...]]:
    end, separator = int(L.llama_vocab_eos(vocab)), int(L.llama_vocab_sep(vocab))
    closing = (separator if end < 0 else end,) if L.llama_vocab_get_add_eos(vocab) else ()
    yield (int(L.llama_vocab_bos(vocab)),) if L.llama_vocab_get_add_bos(vocab) else ()
    yield PairPart.QUERY
    yield closing
    yield (separator,) if L.llama_vocab_get_add_sep(vocab) else ()
    yield PairPart.DOCUMENT
    yield closing
