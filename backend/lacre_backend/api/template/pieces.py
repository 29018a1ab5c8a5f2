"""Pieces of a prompt, plain text and control tokens, and the ids of each.

The rule: no plain text becomes a control token.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lacre_backend.api.tools.known import KNOWN_CALLS
from lacre_backend.engine.protocol import ControlToken, Engine, EngineError, ModelInfo, PairPart, PlacedImage, ReadImage

Piece = str | ControlToken  # str: plain text, in which no control token is recognized
_PLACE: Final = 0  # the token at the places of an image: any that the model has


@dataclass(frozen=True, slots=True)
class Shown:
    """An image among the pieces of a prompt."""

    image: ReadImage


def markers_of(engine: Engine) -> tuple[ControlToken, ...]:
    """Tokens that mark calls and their results, if llama.cpp also recognizes them in plain text."""
    found = []
    for literal in {literal for form in KNOWN_CALLS for literal in form.markers}:
        ids = engine.tokenize(literal)
        if len(ids) == 1:
            found.append(ControlToken(ids[0], literal))
    return tuple(found)


async def shown_tokens(
    engine: Engine, pieces: Sequence[Piece | Shown], control: Sequence[ControlToken] = ()
) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """The prompt's ids, and its images: at their places the ids mean nothing. Adds the beginning of sequence if the model needs
    it and the template wrote none.

    control: tokens that plain text must not become; default: the model's own. Raises as `Engine.tokens`.
    """
    texts = {i: _bare(pieces, i, piece) for i, piece in enumerate(pieces) if isinstance(piece, str)}
    found = iter(await _plain(engine, list(texts.values()), control or engine.model.control_tokens))
    ids: list[int] = []
    images: list[PlacedImage] = []
    for piece in pieces:
        match piece:
            case ControlToken():
                ids.append(piece.id)
            case Shown():
                ids = ids or begun(engine.model, ids)  # an image is no beginning of a sequence
                images.append(PlacedImage(len(ids), piece.image))
                ids += [_PLACE] * piece.image.tokens
            case _:
                ids += next(found)
    whole = begun(engine.model, ids)
    ahead = len(whole) - len(ids)
    return whole, tuple(PlacedImage(placed.at + ahead, placed.image) for placed in images)


def _bare(pieces: Sequence[Piece | Shown], i: int, text: str) -> str:
    """Removes white space that some tokenizers drop beside some control tokens."""
    before = pieces[i - 1] if i > 0 else None
    after = pieces[i + 1] if i + 1 < len(pieces) else None
    text = text.lstrip() if isinstance(before, ControlToken) and before.rstrip else text
    return text.rstrip() if isinstance(after, ControlToken) and after.lstrip else text


async def answer_tokens(engine: Engine, text: str, control: Sequence[ControlToken]) -> list[int]:
    """The ids of an answer, as they follow a prompt. control: as in `shown_tokens`. Raises as `Engine.tokens`."""
    (ids,) = await _plain(engine, [text], control)
    return ids


async def text_tokens(engine: Engine, text: str) -> list[int]:
    """The ids of a text prompt. It contains no control token except the beginning of sequence, if the model needs it.

    Raises as `Engine.tokens`.
    """
    (ids,) = await _plain(engine, [text], engine.model.control_tokens)
    return begun(engine.model, ids)


async def embedding_tokens(engine: Engine, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts to embed, including the tokens that the tokenizer adds around each. No control token is recognized in
    them. Text that no token covers may become the vocabulary's unknown token. Raises as `Engine.tokens`.
    """
    return [framed(engine.model, ids) for ids in await engine.tokens(texts)]


async def pair_tokens(engine: Engine, query: str, documents: Sequence[str]) -> list[list[int]]:
    """The ids of a query with each document, in the form that a reranker reads. As in `embedding_tokens`, no control token is
    recognized in the texts. Raises as `Engine.tokens`.
    """
    read, *each = await engine.tokens([query, *documents])
    pairs = []
    for document in each:
        texts = {PairPart.QUERY: read, PairPart.DOCUMENT: document}
        pieces = [texts[part] if isinstance(part, PairPart) else part for part in engine.model.pair]
        pairs.append(list(itertools.chain.from_iterable(pieces)))
    return pairs


def framed(model: ModelInfo, ids: Sequence[int]) -> list[int]:
    before, after = model.frame
    return [*before, *ids, *after]


def begun(model: ModelInfo, ids: list[int]) -> list[int]:
    """With the beginning of sequence, if the model needs it."""
    if model.add_bos and model.bos is not None and ids[:1] != [model.bos.id]:
        return [model.bos.id, *ids]
    return ids


async def _plain(engine: Engine, texts: Sequence[str], steering: Sequence[ControlToken]) -> list[list[int]]:
    """The ids of plain texts, none of them a control token's.

    llama.cpp recognizes "user defined" tokens in plain text too, and a file may wrongly give this type to a token that ends
    generation. Then the literal is cut after its first character, so that it is no longer recognized.
    """
    control = {token.id for token in steering}
    found = await engine.tokens(texts)
    recognised = [i for i, ids in enumerate(found) if not control.isdisjoint(ids)]
    if not recognised:
        return found
    literal = any_of({token.text: token for token in steering if token.text})
    for i in recognised:
        cuts = [0, *(match.start() + 1 for match in literal.finditer(texts[i])), len(texts[i])]
        parts = await engine.tokens([texts[i][a:b] for a, b in itertools.pairwise(cuts)])
        found[i] = list(itertools.chain.from_iterable(parts))
        if not control.isdisjoint(found[i]):
            raise EngineError("The tokenizer makes control tokens out of plain text.")
    return found


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Merges adjacent plain pieces, so that they are tokenized as one. Drops empty ones."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def any_of(literals: Mapping[str, ControlToken]) -> re.Pattern[str]:
    """A pattern that tries the longest literal first, as llama.cpp does. Without literals it never matches.

    It is a tree of common prefixes: a vocabulary has thousands of literals that begin alike, and a text may repeat that
    beginning. Tried one by one, 6,000 cost 84 µs per character.
    """
    return re.compile(_branches(sorted(filter(None, literals))) or r"(?!)")


def _branches(literals: Sequence[str]) -> str:
    """literals: sorted. Literals with a common prefix become one branch, whose greedy rest has the longest first."""
    branches = []
    for _, group in itertools.groupby(literals, lambda literal: literal[0]):
        alike = list(group)
        begin = os.path.commonprefix(alike)  # noqa: RUF071 - they are not paths
        rests = [literal[len(begin) :] for literal in alike]
        optional = "?" if rests[0] == "" else ""
        rest = _branches([each for each in rests if each])
        branches.append(re.escape(begin) + (rest and f"(?:{rest}){optional}"))
    return "|".join(branches)
