"""How well a model does a user's own examples: the jobs of `lacre model choose --examples`.

Rules:
- A model runs as the worker runs it: the same engine, template and tokens. Answers are greedy, so they repeat.
- A text that does not fit into the model is an error that names its line. It is not cut off and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.messages import Message
from lacre_backend.api.prompts import chat_prompt, embedding_inputs, given_answer, text_prompt
from lacre_backend.api.registry import ServedModel
from lacre_backend.engine.context import Logits
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.model import Model, ModelMetadata
from lacre_backend.engine.protocol import Embedding, Finish, PromptTooLong, Sampling, Task, TaskKind, Token
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.workshop.child import Job, Report
from lacre_backend.workshop.examples import (
    ChatExample,
    Examples,
    NearestExample,
    RerankExample,
    SimilarPair,
    normalized,
)
from lacre_backend.workshop.fidelity import (
    check_vocabulary,
    divergence,
    fidelity_to,
    log_softmax,
    read_text,
    reference,
    token_names,
)
from lacre_backend.workshop.reranking import rank_reader
from lacre_backend.workshop.source import SourceModel, loaded
from lacre_backend.workshop.windows import window_reader

MOST_CONTEXT: Final = 4096  # tokens of a prompt and its answer; a larger cache would take the memory of several models
MOST_ANSWER: Final = 512  # tokens of an answer that is compared
SPARE: Final = 16  # tokens beyond the longest right answer: punctuation and quotes do not count
REFERENCE_ANSWER: Final = 64  # tokens of the reference's own answer, where the example has none
_MOST_KEPT: Final = 512 * 2**20  # bytes of the reference's probabilities: 2,700 tokens with a vocabulary of 49,000
_ROWS: Final = 32  # processed at once, in double precision

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class JudgeAsked:
    path: Path
    examples: Examples


@dataclass(frozen=True, slots=True)
class Miss:
    """line: of the example. got: the answer, the text that was nearer, or the document that came first."""

    line: int
    got: str


@dataclass(frozen=True, slots=True)
class Score:
    """measure: `exact match` or `hit rate`, as a share of all examples, or `rank correlation` (Spearman's), from -1 to 1.

    missed: the examples that failed; a correlation has none. tokens_per_second: of a reranker's reading.
    """

    measure: str
    value: float
    examples: int
    missed: list[Miss] = field(default_factory=list)
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    """Token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class ReferenceAnswers:
    answers: list[ReferenceAnswer]


@dataclass(frozen=True, slots=True)
class LossAsked:
    """answers: of `reference`; empty: the text that ships counts."""

    reference: Path
    path: Path
    answers: list[ReferenceAnswer]


@dataclass(frozen=True, slots=True)
class Loss:
    """kl: mean divergence from the reference's probabilities over the tokens of all answers, or of the text, in nats."""

    kl: float
    tokens: int


def judge(asked: JudgeAsked, report: Report) -> Score:
    """Raises SettingsError."""
    report("loading", 0.0)
    examples = asked.examples
    if examples.rerank:
        return _reranked(asked.path, examples.rerank, report)
    if examples.chat:
        with _chatting(asked.path) as served:
            return asyncio.run(_matched(served, examples.chat, report))
    with closing(LlamaEmbedder(asked.path, name=asked.path.stem, digest="")) as engine:
        return asyncio.run(_embedded(ServedModel(engine), examples, report))


def answers(asked: JudgeAsked, report: Report) -> ReferenceAnswers:
    """What the reference says: the example's first right answer, or else its own. Raises SettingsError."""
    report("loading the reference", 0.0)
    if ModelMetadata.read(asked.path).kind is TaskKind.EMBED:
        raise SettingsError(f"{asked.path} embeds text. Give a reference that generates.")
    with _chatting(asked.path) as served:
        return ReferenceAnswers(asyncio.run(_said(served, asked.examples.chat, report)))


def loss(asked: LossAsked, report: Report) -> Loss:
    """Raises OtherVocabulary or SettingsError."""
    if not asked.answers:
        return _loss_on_text(asked, report)
    report("the reference on the examples", 0.0)
    with loaded(asked.reference) as model:
        names = token_names(model)
        expected = [each.astype(np.float32) for each in _logs(asked.reference, model, asked.answers)]
    report("the examples", 0.5)
    with loaded(asked.path) as model:
        check_vocabulary(asked.reference, names, asked.path, token_names(model))
        both = zip(expected, _logs(asked.path, model, asked.answers), strict=True)
        found = np.concatenate([divergence(ours, theirs) for ours, theirs in both])
    return Loss(float(found.mean()), len(found))


def _loss_on_text(asked: LossAsked, report: Report) -> Loss:
    report("the reference on a text", 0.0)
    with loaded(SourceModel.read(asked.reference).path) as model:
        expected = reference(asked.reference, model, read_text(None))
    report("the text", 0.5)
    with loaded(asked.path) as model:
        found = fidelity_to(expected, asked.path, model)
    return Loss(found.kl, found.tokens)


JUDGE: Final = Job(f"{__name__}:JUDGE", JudgeAsked, Score, judge)
ANSWERS: Final = Job(f"{__name__}:ANSWERS", JudgeAsked, ReferenceAnswers, answers)
LOSS: Final = Job(f"{__name__}:LOSS", LossAsked, Loss, loss)


# Chat


@contextmanager
def _chatting(path: Path) -> Iterator[ServedModel]:
    context = min(ModelMetadata.read(path).n_ctx_train, MOST_CONTEXT)
    with closing(LlamaEngine(path, name=path.stem, digest="", settings=LlamaSettings(n_ctx=context))) as engine:
        yield ServedModel(engine)


async def _matched(served: ServedModel, examples: Sequence[ChatExample], report: Report) -> Score:
    report("the examples", 0.1)
    right = [await _lengths(served, example) for example in examples]
    limits = [min(longest + SPARE, MOST_ANSWER) for longest in right]
    texts = await _texts(served, examples, limits, report)
    missed = [
        Miss(example.line, text)
        for example, text in zip(examples, texts, strict=True)
        if normalized(text) not in map(normalized, example.expected)
    ]
    return _share("exact match", len(examples), missed)


async def _lengths(served: ServedModel, example: ChatExample) -> int:
    """Tokens of the longest right answer."""
    with _at(example.line):
        return max([len(await given_answer(served, text)) for text in example.expected])


async def _texts(served: ServedModel, examples: Sequence[ChatExample], limits: Sequence[int], report: Report) -> list[str]:
    ended = _counted(len(examples), report)

    async def text(example: ChatExample, limit: int) -> str:
        events = await _events(served, example, await _prompt(served, example), limit)
        ended()
        return "".join(event.text for event in events)

    return await tasks.together(*map(text, examples, limits))


async def _said(served: ServedModel, examples: Sequence[ChatExample], report: Report) -> list[ReferenceAnswer]:
    """Answers are as short as the memory for their probabilities demands."""
    rows = max(_MOST_KEPT // (4 * served.engine.model.n_vocab), 1)
    kept = examples[:rows]
    limit = min(REFERENCE_ANSWER, rows // len(kept))
    ended = _counted(len(kept), report)

    async def answer(example: ChatExample) -> ReferenceAnswer:
        prompt = await _prompt(served, example)
        with _at(example.line):
            given = await given_answer(served, example.expected[0]) if example.expected else []
        if not given:
            events = await _events(served, example, prompt, limit)
            given = [event.id for event in events if isinstance(event, Token)]
        ended()
        room = served.engine.model.n_ctx - len(prompt)
        return ReferenceAnswer(prompt, given[: min(limit, room)])

    found = [each for each in await tasks.together(*map(answer, kept)) if each.answer]
    if not found:
        raise SettingsError("The reference answers none of the examples. Give examples with `expected`.")
    return found


async def _prompt(served: ServedModel, example: ChatExample) -> list[int]:
    with _at(example.line):
        if served.template is None:
            if example.messages:
                raise SettingsError("the model has no chat template; such a model takes `prompt` alone")
            return await text_prompt(served, example.prompt)
        said = [(each.role, each.content) for each in example.messages] or [("user", example.prompt)]
        messages = [Message.model_validate({"role": role, "content": content}) for role, content in said]
        return await chat_prompt(served, messages, (), goes_on=False)


async def _events(served: ServedModel, example: ChatExample, prompt: list[int], limit: int) -> list[Token | Finish]:
    """Without a template, an answer is a line, unless a right one has several."""
    lines = served.template is not None or any("\n" in text for text in example.expected)
    with _at(example.line):
        room = served.engine.model.n_ctx - len(prompt)
        stop = () if lines else ("\n",)
        task = Task(str(example.line), tuple(prompt), max(1, min(limit, room)), sampling=Sampling(temperature=0), stop=stop)
        stream = served.engine.submit(task)
    return [event async for event in stream if isinstance(event, Token | Finish)]


def _logs(path: Path, model: Model, found: Sequence[ReferenceAnswer]) -> Iterator[Logits]:
    """For each answer, the logarithms of the probabilities of its tokens: (tokens, vocabulary)."""
    size = max(len(each.prompt) + len(each.answer) for each in found)
    outputs = max(len(each.answer) for each in found)
    with window_reader(model, None, size, outputs) as reader:
        for each in found:
            logits = reader.logits(each.prompt + each.answer[:-1], len(each.prompt) - 1)
            if not np.isfinite(logits).all():
                raise SettingsError(f"{path} computes values that are infinite or not numbers. Copy it again.")
            yield np.concatenate([log_softmax(logits[at : at + _ROWS]) for at in range(0, len(logits), _ROWS)])


# Embed and rerank


async def _embedded(served: ServedModel, examples: Examples, report: Report) -> Score:
    report("the examples", 0.1)
    if examples.similar:
        return await _correlated(served, examples.similar, report)
    return await _nearest(served, examples.nearest, report)


async def _nearest(served: ServedModel, examples: Sequence[NearestExample], report: Report) -> Score:
    lines = {text: each.line for each in examples for text in (each.text, each.nearest, *each.others)}
    vectors = await _vectors(served, lines, report)
    every = {each.nearest for each in examples}
    missed: list[Miss] = []
    for each in examples:
        text, others = vectors[each.text], each.others or sorted(every - {each.nearest})
        cosine, nearer = max((float(text @ vectors[other]), other) for other in others)
        if cosine >= float(text @ vectors[each.nearest]):
            missed.append(Miss(each.line, nearer))
    return _share("hit rate", len(examples), missed)


async def _correlated(served: ServedModel, pairs: Sequence[SimilarPair], report: Report) -> Score:
    lines = {text: each.line for each in pairs for text in (each.text, each.other)}
    vectors = await _vectors(served, lines, report)
    cosines = np.array([float(vectors[each.text] @ vectors[each.other]) for each in pairs])
    return Score("rank correlation", round(rank_correlation(cosines, np.array([p.similarity for p in pairs])), 4), len(pairs))


async def _vectors(served: ServedModel, lines: dict[str, int], report: Report) -> dict[str, Vectors]:
    """Of each text, of length one. lines: where it is."""
    ended = _counted(len(lines), report)

    async def vector(text: str, line: int) -> Vectors:
        with _at(line):
            (ids,) = await embedding_inputs(served, [text])
            stream = served.engine.submit(Task(text, tuple(ids), 1, TaskKind.EMBED))
        (found,) = [event async for event in stream if isinstance(event, Embedding)]
        ended()
        return np.array(found.values, np.float32)

    return dict(zip(lines, await tasks.together(*map(vector, lines, lines.values())), strict=True))


def rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's, where equal values share the mean of their ranks. 0 if all of one are equal."""

    def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[places]

    first, second = ranks(one), ranks(other)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _reranked(path: Path, examples: Sequence[RerankExample], report: Report) -> Score:
    missed: list[Miss] = []
    ended = _counted(len(examples), report)
    with loaded(path) as model, rank_reader(path, model) as reader:
        for each in examples:
            with _at(each.line):
                scores = [(reader.score(each.query, document), document) for document in each.documents]
            right, _ = scores.pop(each.index)
            best, first = max(scores)
            if best >= right:
                missed.append(Miss(each.line, first))
            ended()
        rate = reader.tokens / reader.seconds
    found = _share("hit rate", len(examples), missed)
    return Score(found.measure, found.value, found.examples, found.missed, round(rate, 1))


def _share(measure: str, count: int, missed: list[Miss]) -> Score:
    return Score(measure, round(1 - len(missed) / count, 4), count, missed)


def _counted(count: int, report: Report) -> Callable[[], None]:
    """To be called after each of `count` examples."""
    done = 0

    def ended() -> None:
        nonlocal done
        done += 1
        report(f"example {done} of {count}", 0.1 + 0.9 * done / count)

    return ended


@contextmanager
def _at(line: int) -> Iterator[None]:
    """Names the line in what the engine refuses."""
    try:
        yield
    except (RequestRefused, PromptTooLong, SettingsError) as exc:
        raise SettingsError(f"the example on line {line}: {exc}") from None
