"""Streams with reasoning and calls, continued by another worker from every mark: in each format, through each face."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Final

import pytest

from backend.posting import post
from backend.test_faces import MESSAGES, RESPONSES
from lacre.asgi import Usage
from lacre.exchange.resume_marks import Mark
from lacre_backend.api.app import create_app
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.chat import Chat
from lacre_backend.api.faces.face import Face
from lacre_backend.api.faces.messages import Messages
from lacre_backend.api.faces.responses import Responses
from lacre_backend.api.http import EventStream
from lacre_backend.api.responses import AnswerName, ResponseInfo
from lacre_backend.api.run import Closing, GenerationRuns
from lacre_backend.api.schema.grammar import Grammars
from lacre_backend.api.streaming import Answer, Progress
from lacre_backend.api.tools.format import HERMES, CallFormat
from lacre_backend.api.tools.harmony import ANALYSIS, END, FINAL, HARMONY_CALLS, NEXT
from lacre_backend.api.tools.known import KNOWN_CALLS
from lacre_backend.api.tools.thoughts import HARMONY, THOUGHTS, AnswerForm, Start, ThoughtFormat
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Grammar, Task
from parts.pieces_engine import PiecesEngine
from parts.scripted_engine import ScriptedEngine
from parts.written_calls import alone, once, written

Event = tuple[str | None, str, Any]  # mark, name, document
NAME: Final = AnswerName("0123456789abcdef01234567", 1790000000)
SCHEMA: Final = {"type": "object", "properties": {"place": {"type": "string"}, "n": {"type": "integer"}}}
CALLS: Final[list[tuple[str, dict[str, Any]]]] = [
    ("weather", {"place": "Vila \"Nova\" } 🦈 </x", "n": 12}), ("now", {}), ("weather", {"place": "世界\n<"}),
]  # fmt: skip
SAID: Final = [{"role": "user", "content": "Hi"}]
CHAT_TOOLS: Final = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "now")]
FLAT_TOOLS: Final = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("weather", "now")]
CUSTOM_TOOLS: Final = [
    {"type": "namespace", "name": "sky", "tools": FLAT_TOOLS[:1]}, {"type": "custom", "name": "now"}
]  # fmt: skip
ANTHROPIC_TOOLS: Final = [{"name": name, "input_schema": SCHEMA} for name in ("weather", "now")]
FACES: Final[dict[str, tuple[Face[Any], dict[str, Any]]]] = {
    "chat": (Chat(), {"messages": SAID, "tools": CHAT_TOOLS, "stream_options": {"include_usage": True}}),
    "responses": (Responses(), {"input": "Hi", "tools": FLAT_TOOLS}),
    "probabilities": (Chat(), {"messages": SAID, "tools": CHAT_TOOLS, "logprobs": True, "top_logprobs": 2}),
    "custom": (Responses(), {"input": "Hi", "tools": CUSTOM_TOOLS}),
    "messages": (Messages(), {"messages": SAID, "tools": ANTHROPIC_TOOLS, "max_tokens": 4096}),
}


class Sent:
    """What a stream sent."""

    def __init__(self) -> None:
        self.body = b""

    async def __call__(self, message: Any) -> None:
        self.body += message.get("body", b"")

    def events(self) -> list[Event]:
        return [read(block) for block in self.body.decode().split("\n\n") if block and block != "data: [DONE]"]


def read(block: str) -> Event:
    fields = dict(line.split(": ", 1) for line in block.split("\n"))
    return fields.get("id"), fields.get("event", ""), json.loads(fields["data"])


async def streamed(
    name: str,
    form: AnswerForm,
    pieces: Sequence[bytes],
    begun: Sequence[int] = (),
    *,
    stop: Sequence[str] = (),
    max_thought: int | None = None,
    limit: int = 4096,
) -> list[Event]:
    """The events of an answer, or of its rest."""
    face, members = FACES[name]
    digest = "sha256:0"
    resume = {"resume": {"digest": digest, "answer": str(NAME), "tokens": list(begun)}} if begun else {}
    request = face.parse(json.dumps({"model": "scripted", "stream": True, **members, **resume}).encode())
    assert request.resumable and request.begun == tuple(begun)
    usage, sent = Usage(), Sent()
    with closing(PiecesEngine(pieces)) as engine:
        task = Task(
            "t",
            prompt=(1, 2, 3),
            max_tokens=limit - len(begun),
            begun=tuple(begun),
            stop=tuple(stop),
            logprobs=request.alternatives(),
        )
        generation = GenerationRuns(engine, [task], 1, usage, "messages", closing=closing_of(engine, form, max_thought))
        generation.submit()
        writer = face.writer(request, ResponseInfo(face.prefix + NAME.id, NAME.created, engine.model, True))
        answer = Answer(
            generation, usage, writer, lambda choice: face.reader(request, form, f"{NAME.id}.{choice}"), max_thought=max_thought
        )
        await answer.stream(EventStream(sent), Progress(usage), named=bool(begun))
        generation.close()
    return sent.events()


def closing_of(engine: PiecesEngine, form: AnswerForm, max_thought: int | None) -> Closing | None:
    async def free(_: tuple[int, ...]) -> Grammar | None:
        return None

    if max_thought is None or form.thoughts is None:
        return None
    return Closing(tuple(form.thoughts.cut.encode()), free)


def counted(events: list[Event]) -> list[Any]:
    """Names and documents without the counts of tokens, which each request has of its own."""
    kept = json.loads(json.dumps([(name, document) for _, name, document in events]))
    for _, document in kept:
        for holder in (document, document.get("response", {}), document.get("message", {})):
            usage = holder.pop("usage", None)
    return [*kept, (usage or {}).get("output_tokens_details")]


def said_in(events: list[Event]) -> str:
    """All that the events add, in order."""
    said = ""
    for _, _, document in events:
        delta = document["choices"][0]["delta"] if document.get("choices") else document.get("delta", "")
        texts = (
            [delta]
            if isinstance(delta, str)
            else [delta.get(key) or "" for key in ("reasoning", "thinking", "content", "text")]
        )
        said += "".join(texts)
    return said


async def check_every_cut(name: str, form: AnswerForm, pieces: Sequence[bytes], **how: Any) -> int:
    """Continues from each mark of an answer. Returns how many there are."""
    whole = await streamed(name, form, pieces, **how)
    marked = [at for at, (mark, _, _) in enumerate(whole) if mark is not None]
    tokens: list[int] = []
    for at in marked:
        tokens += Mark.parse(str(whole[at][0])).tokens
        rest = await streamed(name, form, pieces, tokens, **how)
        assert counted([*whole[: at + 1], *rest]) == counted(whole), f"cut after {len(tokens)} tokens"
    return len(marked)


def cut_up(text: str, source: random.Random) -> list[bytes]:
    """Tokens as a model has them: some are half a code point, some a whole call's beginning."""
    raw, pieces, at = text.encode(), list[bytes](), 0
    while at < len(raw):
        n = source.choice([1, 1, 2, 3, 5, 9, 30])
        pieces.append(raw[at : at + n])
        at += n
    return pieces


def spoken(form: AnswerForm, calls: CallFormat, source: random.Random) -> str:
    thought, text = source.choice(["Hm <x> 世", "a\n\nb </thin k", ""]), source.choice(["Sim 🦈.", "Wait <tool", ""])
    made = CALLS[: source.choice([0, 1, 2, 3])][: 1 if once(calls) else None]
    if form.thoughts is HARMONY:
        said = f"{FINAL}{text}" if not made else written(calls, made)
        return f"{ANALYSIS}{thought}{END}{NEXT}{said}" if thought else said
    opened = "" if form.thoughts is None else f"{form.thoughts.open}\n{thought}\n{form.thoughts.close}\n\n"
    if alone(calls):
        return opened + (written(calls, made) if made else text)
    return "\n".join([opened + text, *([written(calls, made)] if made else [])])


def forms() -> Iterator[tuple[CallFormat, ThoughtFormat | None]]:
    for calls in KNOWN_CALLS:
        yield calls, HARMONY if calls is HARMONY_CALLS else THOUGHTS[0]
    yield HERMES, None
    yield from ((HERMES, thoughts) for thoughts in THOUGHTS[1:])


def label(value: Any) -> str:
    if isinstance(value, CallFormat):
        return "".join(filter(str.isalnum, f"{value.begin}{value.open}"))[:20]
    return "".join(filter(str.isalnum, value.close)) if isinstance(value, ThoughtFormat) else str(value)


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize(("calls", "thoughts"), list(forms()), ids=label)
async def test_every_cut_of_every_format_continues_exactly(
    name: str, calls: CallFormat, thoughts: ThoughtFormat | None
) -> None:
    form = AnswerForm(calls, thoughts, Start.SPEAKING if thoughts is None else Start.FRESH)
    source, cuts = random.Random(label(calls) + label(thoughts)), 0
    for _ in range(6):
        cuts += await check_every_cut(name, form, cut_up(spoken(form, calls, source), source))
    assert cuts > 15


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize(
    ("thoughts", "start"),
    [(THOUGHTS[0], Start.FRESH), (THOUGHTS[0], Start.THINKING), (THOUGHTS[3], Start.FRESH), (HARMONY, Start.FRESH)],
    ids=label,
)
async def test_a_budget_of_reasoning_is_the_whole_answers(name: str, thoughts: ThoughtFormat, start: Start) -> None:
    """Cut by the first worker or by the second: the marks that end the reasoning come once, and none of it twice."""
    calls = HARMONY_CALLS if thoughts is HARMONY else HERMES
    form, source = AnswerForm(calls, thoughts, start), random.Random(3)
    for budget in (1, 9):
        opened = thoughts.open if start is Start.FRESH else ""
        pieces = cut_up(opened + "Hm < <".join("abcdefghijklmnopq" * (6 if thoughts is HARMONY else 2)), source)
        text = said_in(await streamed(name, form, pieces, max_thought=budget))
        assert thoughts.close not in text and text.endswith("Hm < <q")
        assert await check_every_cut(name, form, pieces, max_thought=budget) > 5


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("stop", ["STOP", 'o"}', "</think>\n\nS"])
async def test_a_stop_string_is_met_once(name: str, stop: str) -> None:
    """In the text, inside of a call's arguments, and across the end of the reasoning."""
    form, source = AnswerForm(HERMES, THOUGHTS[0], Start.FRESH), random.Random(4)
    said = f"<think>Hm S</think>\n\nSo. ST\n{HERMES.written('weather', json.dumps({'place': 'Porto'}))} STOP"
    cuts = [await check_every_cut(name, form, cut_up(said, source), stop=(stop, "ST!")) for _ in range(5)]
    assert sum(cuts) > 5


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("limit", [7, 9, 14, 21])
async def test_the_limit_is_the_whole_answers(name: str, limit: int) -> None:
    form, source = AnswerForm(HERMES, THOUGHTS[0], Start.FRESH), random.Random(limit)
    pieces = cut_up(spoken(form, HERMES, random.Random(6)), source)
    assert await check_every_cut(name, form, pieces, limit=limit) >= 1


@pytest.mark.parametrize("calls", KNOWN_CALLS, ids=label)
@pytest.mark.parametrize("thoughts", [None, THOUGHTS[0]], ids=label)
def test_the_grammar_continues_from_every_token(llama: LlamaEngine, calls: CallFormat, thoughts: ThoughtFormat | None) -> None:
    """Its state behind each token admits the next one: inside of reasoning, of text, of each call, and between two."""
    thoughts = HARMONY if calls is HARMONY_CALLS else thoughts
    form = AnswerForm(calls, thoughts, Start.SPEAKING if thoughts is None else Start.FRESH)
    request = Chat().parse(json.dumps({"model": "m", "messages": SAID, "tools": CHAT_TOOLS}).encode())
    source = request.grammar(form, Grammars()) or ""
    made: list[tuple[str, dict[str, Any]]] = [("weather", {"place": "Nova", "n": 7}), ("now", {})][: 1 if once(calls) else None]
    text = "" if alone(calls) or calls is HARMONY_CALLS else f"{calls.answer * form.fresh}Sim <b> é.\n"
    said = text + written(calls, made)
    if thoughts is HARMONY:
        said = f"{ANALYSIS}Hm{END}{NEXT}{said}"
    elif thoughts is not None:
        said = f"{thoughts.open}\nHm < é\n{thoughts.close}\n\n{said}"
    tokens = llama.tokenize(said)
    for at in range(0, len(tokens), 5):
        allowed = llama._masks.compile(source, tokens[:at]).allowed
        assert allowed[tokens[at]], f"behind {at} tokens"


@pytest.mark.parametrize("name", ["responses", "messages"])
async def test_an_api_whose_events_name_their_answer_needs_the_name(name: str) -> None:
    face, members = FACES[name]
    body = {"model": "scripted", "stream": True, **members, "resume": {"digest": "sha256:0", "tokens": [1]}}
    with pytest.raises(RequestRefused) as refused:
        face.parse(json.dumps(body).encode())
    assert refused.value.param == "resume.answer"


def test_log_probabilities_of_a_response_are_not_resumed() -> None:
    body = {"model": "m", "stream": True, "input": "Hi", "include": ["message.output_text.logprobs"]}
    assert not Responses().parse(json.dumps(body).encode()).resumable


@pytest.mark.parametrize("name", FACES)
async def test_no_mark_stands_inside_of_a_cut(name: str) -> None:
    """The first of the tokens that end the reasoning may release text that was held back."""
    form = AnswerForm(HERMES, THOUGHTS[0], Start.THINKING)
    for budget in range(1, 6):
        assert await check_every_cut(name, form, [b"a", b" <", b"</th", b" <", b"b"] * 9, max_thought=budget) > 5


@pytest.mark.parametrize(
    ("path", "members"), [(RESPONSES, FACES["responses"][1]), (MESSAGES, FACES["messages"][1])], ids=["responses", "messages"]
)
async def test_the_api_goes_on_under_the_same_name(path: str, members: dict[str, Any]) -> None:
    """Ids of the answer, its items and its calls, and the numbers of its events."""
    said = f"Sim.\n{written(HERMES, CALLS)}"
    with closing(ScriptedEngine(lambda _: said)) as engine:
        app = create_app([engine])
        body, ask = {"model": "scripted", "stream": True, **members}, [(b"lacre-resume", b"?1")]
        first = await post(app, path, body, headers=ask)
        got = [read(block) for block in first.body.decode().split("\n\n") if block]
        tokens: list[int] = []
        for at, (mark, _, _) in enumerate(got):
            if mark is None:
                continue
            tokens += Mark.parse(mark).tokens
            resume = {"digest": engine.model.digest, "answer": first.headers["lacre-answer"], "tokens": tokens}
            rest = await post(app, path, {**body, "resume": resume}, headers=ask)
            again = [read(block) for block in rest.body.decode().split("\n\n") if block]
            assert counted([*got[: at + 1], *again]) == counted(got)
            assert rest.headers["lacre-answer"] == first.headers["lacre-answer"]
