"""What a worker and an engine's process say to each other: every message comes out as it went in, and no bytes do harm."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import InvalidMessage, LacreError, UsageError
from lacre_backend.api.requests import MAX_CHOICES
from lacre_backend.engine.protocol import (
    Alternative,
    Embedding,
    EngineError,
    Finish,
    LayerView,
    ModelInfo,
    PairPart,
    PlacedImage,
    PromptProgress,
    PromptTooLong,
    Sampling,
    Task,
    TaskKind,
    TaskRefused,
    Token,
)
from lacre_backend.engine_process.child import KeysOfWorker, Pipe
from lacre_backend.engine_process.messages import (
    FROM_CHILD,
    MAX_FRAME,
    TO_CHILD,
    Answered,
    Cancel,
    Close,
    Compile,
    Failed,
    Failure,
    Forget,
    HeldGrammar,
    HeldImage,
    Load,
    ModelKey,
    OwnText,
    Picture,
    Pulse,
    Ready,
    Speak,
    Submit,
    TaskEvent,
    ToChild,
    Unanswered,
    Unframer,
    Unloadable,
    UserTexts,
    WantKey,
    framed,
    raised,
    told,
)
from lacre_backend.models.sealed import SealedModelInvalid
from lacre_fabric.keys.kms import EncryptionContext, KmsUnreachable, WrongWrapping
from parts.echo_engine import EchoEngine

WHOLE = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**40)
REAL = st.floats(allow_nan=False)
TEXT = st.text(st.characters(), max_size=20)  # with lone surrogates
IDS = st.lists(st.integers(-(2**31), 2**33), max_size=6).map(tuple)
NAME = st.text(max_size=8)


each = st.builds
grammars = each(HeldGrammar, number=COUNT, begun=IDS)
images = each(PlacedImage, at=COUNT, image=each(HeldImage, number=COUNT, tokens=COUNT))
samplings = each(
    Sampling, temperature=REAL, top_p=REAL, top_k=WHOLE, min_p=REAL, frequency_penalty=REAL, presence_penalty=REAL,
    repeat_penalty=REAL, seed=st.none() | st.integers(), logit_bias=st.dictionaries(COUNT, REAL, max_size=3),
    grammar=st.none() | TEXT | grammars,
)  # fmt: skip
tasks = each(
    Task, id=NAME, prompt=IDS, max_tokens=WHOLE, kind=st.sampled_from(TaskKind), sampling=samplings,
    stop=st.lists(TEXT, max_size=2).map(tuple), logprobs=st.none() | WHOLE, cache_scope=st.none() | st.binary(max_size=9),
    fair=st.tuples(NAME, NAME), time_limit=st.none() | REAL, begun=IDS, group=st.none() | NAME, given=IDS,
    adapter=st.none() | NAME, lens=COUNT, images=st.lists(images, max_size=2).map(tuple),
)  # fmt: skip
alternatives = each(Alternative, id=COUNT, raw=st.binary(max_size=5), logprob=REAL)
layers = each(LayerView, layer=COUNT, rank=COUNT, logprob=REAL, says=st.binary(max_size=5))
events = (
    each(PromptProgress, prompt_tokens=COUNT, cached_tokens=COUNT)
    | each(
        Token, id=COUNT, text=TEXT, raw=st.binary(max_size=9), logprob=st.none() | REAL,
        top=st.lists(alternatives, max_size=3).map(tuple), cached_tokens=COUNT, layers=st.lists(layers, max_size=2).map(tuple),
    )
    | each(Embedding, values=st.lists(REAL, max_size=5).map(tuple))
    | each(
        Finish, reason=st.sampled_from(["stop", "length", "cancelled"]), prompt_tokens=COUNT, cached_tokens=COUNT,
        completion_tokens=COUNT, text=TEXT, stop=st.none() | TEXT,
    )
)  # fmt: skip
failures = each(Failure, kind=st.integers(0, 5), message=TEXT, remedy=TEXT, field=NAME, n_prompt=COUNT, n_ctx=COUNT)
infos = st.just(EchoEngine().model).map(
    lambda info: dataclasses.replace(info, frame=((1,), (2, 3)), pair=((1, 2), PairPart.QUERY, (), PairPart.DOCUMENT))
)
to_child = (
    each(Load, settings=TEXT, scheme=NAME)
    | each(ModelKey, key=st.none() | st.binary(max_size=32), failure=st.none() | failures)
    | each(Submit, tasks=st.lists(tasks, max_size=2).map(tuple), prompts=st.lists(IDS, max_size=3).map(tuple), which=IDS)
    | each(Cancel, task=NAME) | each(Speak, tokens=IDS)
    | each(OwnText, number=COUNT, text=TEXT, special=st.booleans())
    | each(UserTexts, number=COUNT, texts=st.lists(TEXT, max_size=3).map(tuple))
    | each(Compile, number=COUNT, source=TEXT, begun=IDS) | each(Picture, number=COUNT, data=st.binary(max_size=9))
    | each(Forget, numbers=IDS) | each(Close)
)  # fmt: skip
from_child = (
    each(WantKey, wrapped=st.binary(max_size=9), digest=NAME)
    | each(
        Ready, info=infos, pieces=st.lists(st.binary(max_size=4), max_size=4).map(tuple), ends=IDS, slots=COUNT,
        adapters=st.lists(st.tuples(NAME, NAME), max_size=2).map(tuple), sees=st.booleans(),
    )
    | each(Unloadable, failure=failures) | each(TaskEvent, task=NAME, event=events) | each(Failed, task=NAME, failure=failures)
    | each(Answered, number=COUNT, ids=st.lists(IDS, max_size=3).map(tuple), tokens=COUNT)
    | each(Unanswered, number=COUNT, failure=failures) | each(Pulse, stuck=st.booleans())
)  # fmt: skip


@given(st.lists(to_child, max_size=4), st.lists(from_child, max_size=4), st.integers(1, 70))
def test_every_message_comes_out_as_it_went_in_however_it_is_cut(down: list[Any], up: list[Any], size: int) -> None:
    for sent, kinds in ((down, TO_CHILD), (up, FROM_CHILD)):
        unframer, stream, came = Unframer(kinds), b"".join(map(framed, sent)), []
        for at in range(0, len(stream), size):
            came += unframer.feed(stream[at : at + size])
        assert came == sent


@given(from_child, st.data())
def test_no_bytes_make_anything_but_messages_or_one_error(message: Any, data: st.DataObject) -> None:
    frame = bytearray(framed(message))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    unframer = Unframer(FROM_CHILD)
    try:
        found = unframer.feed(bytes(frame) + data.draw(st.binary(max_size=20)))
    except InvalidMessage:
        return
    assert all(type(one) in FROM_CHILD for one in found)


def test_what_is_too_long_is_refused_by_its_head() -> None:
    with pytest.raises(InvalidMessage):
        Unframer(FROM_CHILD).feed((MAX_FRAME + 1).to_bytes(4, "little") + b"\0")
    with pytest.raises(InvalidMessage):
        Unframer(FROM_CHILD).feed((0).to_bytes(4, "little") + b"\0")
    with pytest.raises(UsageError, match="larger"):
        framed(Picture(1, bytes(MAX_FRAME)))


def asked(count: int, prompt: tuple[int, ...]) -> list[Task]:
    """The choices of one request, as the API makes them."""
    first = Task("t.0", prompt, 1)
    return [dataclasses.replace(first, id=f"t.{number}") for number in range(count)]


@given(st.lists(tasks, max_size=3))
def test_tasks_come_out_whole(sent: list[Task]) -> None:
    (came,) = Unframer(TO_CHILD).feed(bytes(framed(Submit.of([*sent, *sent]))))
    assert list(came.whole()) == [*sent, *sent]
    assert len(came.prompts) == len({id(task.prompt) for task in sent})


def test_as_many_choices_as_a_request_may_have_fit_one_message() -> None:
    """Of a prompt as long as the longest contexts. They share it, also once they have arrived."""
    frame = framed(Submit.of(asked(MAX_CHOICES, tuple(range(2**18)))))
    assert len(frame) < 2**21
    (came,) = Unframer(TO_CHILD).feed(bytes(frame))
    whole = came.whole()
    assert len(whole) == MAX_CHOICES and len({id(task.prompt) for task in whole}) == 1
    assert whole[-1].prompt == tuple(range(2**18))


def test_too_many_tokens_are_the_caller_s_error() -> None:
    prompts = [tuple([number] * 2**18) for number in range(66)]
    with pytest.raises(TaskRefused, match=r"more than 64 MiB as tokens\. Send them in several requests") as caught:
        framed(Submit.of([Task(f"t.{number}", prompt, 1) for number, prompt in enumerate(prompts)]))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("which", [(), (1,), (-1,), (0, 0)])
def test_a_task_without_its_prompt_is_refused(which: tuple[int, ...]) -> None:
    with pytest.raises(InvalidMessage):
        Submit((Task("t", (), 1),), ((1,),), which).whole()


def test_a_count_beyond_the_message_is_refused_before_it_is_allocated() -> None:
    frame = bytearray(framed(Answered(1, ((1, 2), (3,)))))
    at = frame.index((2).to_bytes(4, "little"), 6)
    frame[at : at + 4] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(InvalidMessage, match="counts more"):
        Unframer(FROM_CHILD).feed(bytes(frame))


def test_each_side_knows_the_other_sides_kinds_alone() -> None:
    last = framed(Close())  # its number is beyond those of the other side
    with pytest.raises(InvalidMessage):
        Unframer(FROM_CHILD).feed(bytes(last))


@pytest.mark.parametrize(
    "error",
    [
        EngineError("at work"), TaskRefused("no", field="grammar"), PromptTooLong(7, 5), SealedModelInvalid("cut off"),
        WrongWrapping("another key"), KmsUnreachable("no answer"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_crosses_with_its_kind_and_its_words(error: LacreError) -> None:
    (failed,) = Unframer(FROM_CHILD).feed(bytes(framed(Failed("t", told(error)))))
    again = raised(failed.failure)
    assert (type(again), str(again), again.remedy) == (type(error), str(error), error.remedy)
    for name in ("field", "n_prompt", "n_ctx"):
        assert getattr(again, name, None) == getattr(error, name, None)


def test_an_unknown_error_is_a_damaged_message() -> None:
    with pytest.raises(InvalidMessage):
        raised(Failure(200, "?"))


def test_every_field_of_a_model_crosses() -> None:
    """A new field of the engine's interface crosses by itself, or this fails."""
    info = dataclasses.replace(EchoEngine().model, n_embd=3, spoken_ids=frozenset({256}))
    (ready,) = Unframer(FROM_CHILD).feed(bytes(framed(Ready(info, (b"a",), (0,), 1, (), False))))
    assert isinstance(ready, Ready)
    for field in dataclasses.fields(ModelInfo):
        assert getattr(ready.info, field.name) == getattr(info, field.name)


class KeptMessage(Pipe):
    """Keeps what it receives."""

    def wait(self) -> ToChild:
        self.kept = super().wait()
        return self.kept


def test_a_key_is_overwritten_where_it_arrived() -> None:
    key, (ours, theirs) = bytes(range(32)), socket.socketpair()
    with ours:
        ours.sendall(framed(ModelKey(key)))
        pipe = KeptMessage(theirs.detach())
        with pipe.socket:
            assert KeysOfWorker("file", pipe).unwrap(b"wrapped", EncryptionContext("model", "", digest="sha256:0")) == key
    assert pipe.kept == ModelKey(bytes(32))
