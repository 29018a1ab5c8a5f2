"""Models that read images: what a picture does to a prompt and its answer.

The projectors here have random weights. What a real one sees was not run: no small one can be had.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.generating import GREEDY, rest_of
from backend.posting import CHAT, post
from lacre.asgi import Call
from lacre.errors import SettingsError
from lacre_backend.api.app import create_app
from lacre_backend.commands.digests import PlannedModels, served_files
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.pictures import decoded
from lacre_backend.engine.protocol import (
    EngineClosed,
    EngineLost,
    Event,
    Finish,
    ImageRefused,
    PlacedImage,
    PromptProgress,
    ReadImage,
    Sampling,
    Task,
    TaskRefused,
    Token,
)
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.workshop.sealing import seal_model
from parts.tiny_model import N_EMBD, tiny_lora, tiny_model
from parts.tiny_projector import TOKENS, file_at, picture, projecting, tiny_projector
from parts.waiting import until

ENDLESS = replace(GREEDY, logit_bias=dict.fromkeys(range(3), -1000.0))  # without the control tokens
SMALL = LlamaSettings(n_ctx=512, threads=1, slots=2)
COUNTS = ("/v1/tokenize", "/v1/responses/input_tokens", "/v1/messages/count_tokens")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", n_ctx=512)


async def test_a_sealed_projector_sees_the_same(tmp_path: Path, base: Path) -> None:
    plain, kms = tiny_projector(tmp_path / "own.gguf"), f"file:{tmp_path / 'kms'}"
    for path in (plain, base):
        seal_model(path, path.with_suffix(".sealed"), kms, lambda _what, _share: None)
    closed = projecting(base.with_suffix(".sealed"), plain.with_suffix(".sealed"), sealed=True)
    answers = []
    for engine in (load_engine(projecting(base, plain)), load_engine(closed, kms)):
        assert isinstance(engine, LlamaEngine)
        with closing(engine):
            answers.append((engine.model.digest, said(await rest_of(engine.submit(await shown(engine, ["red"]))))))
    (told,) = served_files(PlannedModels(models=(projecting(base, plain),)))["tiny"].sha256
    assert answers[0] == answers[1] and answers[0][0] == f"sha256:{told}", "the worker has what the manifest names"
    with pytest.raises(SettingsError, match="is not sealed"):
        load_engine(projecting(base.with_suffix(".sealed"), plain, sealed=True), kms)


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_each_format_becomes_pixels(kind: str) -> None:
    pixels = decoded(picture("red", kind=kind))
    assert (pixels.width, pixels.height, len(pixels.rgb)) == (50, 40, 3 * 50 * 40)
    red, green, blue = pixels.rgb[:3]
    assert red > 250 and max(green, blue) < 5


def test_what_is_transparent_becomes_white() -> None:
    assert set(decoded(picture((255, 0, 0, 0))).rgb) == {255}


def test_a_turned_photo_is_made_upright() -> None:
    image = pytest.importorskip("PIL.Image")
    turned = image.Exif()
    turned[0x0112] = 6  # turn it right
    pixels = decoded(picture("red", (50, 40), "JPEG", exif=turned))
    assert (pixels.width, pixels.height) == (40, 50)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_any_broken_picture_is_refused(kind: str) -> None:
    whole, random = picture("red", kind=kind), np.random.default_rng(1)
    for _ in range(200):
        bent = bytearray(whole[: int(random.integers(len(whole)))] if random.random() < 0.3 else whole)
        for at in random.integers(len(bent) or 1, size=int(random.integers(1, 6))) if bent else ():
            bent[at] = int(random.integers(256))
        try:
            assert decoded(bytes(bent)).rgb, "a picture that survived"
        except ImageRefused:
            continue
    with pytest.raises(ImageRefused, match="broken"):
        decoded(whole[:30])


def test_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageRefused, match="pixels"):
        decoded(picture("red", (4100, 4100), compress_level=1))


def test_a_photo_of_many_scans_is_refused_before_it_is_decoded() -> None:
    """Each scan costs a pass over the whole picture, and takes a dozen bytes."""
    photo = picture("red", kind="JPEG", progressive=True)
    last = photo.rindex(b"\xff\xda")
    assert 1 < photo.count(b"\xff\xda") < 20, "a real one has few"
    repeated = photo[last:-2] * 100 + photo[-2:]
    assert decoded(photo).width == 50
    with pytest.raises(ImageRefused, match="more than 100 scans"):
        decoded(photo[:last] + repeated)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (16384, 80)])
def test_a_line_is_no_picture(size: tuple[int, int]) -> None:
    with pytest.raises(ImageRefused, match="200 times"):
        decoded(picture("red", size))


# What the model makes of them


def load(base: Path, projector: Path, **options: Any) -> LlamaEngine:
    return LlamaEngine(base, name="tiny", digest="sha256:0", settings=SMALL, projector=file_at(projector), **options)


@pytest.fixture
def seeing(tmp_path: Path, base: Path) -> Iterator[LlamaEngine]:
    with closing(load(base, tiny_projector(tmp_path / "own.gguf"))) as engine:
        yield engine


async def read(engine: LlamaEngine | ProcessEngine, data: bytes) -> ReadImage:
    assert engine.model.images is not None
    return await engine.model.images.read(data)


async def shown(
    engine: LlamaEngine | ProcessEngine, colours: Sequence[Any], texts: Sequence[str] = ("look: ", " say:"), **fields: Any
) -> Task:
    """A task with an image of each colour between the texts."""
    prompt, images = list(engine.tokenize(texts[0])), list[PlacedImage]()
    for colour, text in zip(colours, texts[1:], strict=True):
        image = await read(engine, picture(colour))
        images.append(PlacedImage(len(prompt), image))
        prompt += [*[0] * image.tokens, *engine.tokenize(text)]
    return Task(**{
        "id": "seen", "prompt": tuple(prompt), "images": tuple(images), "max_tokens": 12, "sampling": ENDLESS, **fields,
    })  # fmt: skip


def said(events: Sequence[Event]) -> list[int]:
    assert isinstance(events[-1], Finish)
    return [event.id for event in events if isinstance(event, Token)]


async def test_the_answer_depends_on_the_picture_and_on_nothing_before_it(seeing: LlamaEngine) -> None:
    answers = [said(await rest_of(seeing.submit(await shown(seeing, [colour])))) for colour in ("red", "blue", "red", "lime")]
    assert answers[0] == answers[2] and len({*map(tuple, answers)}) == 3
    pairs = (("red", "blue"), ("blue", "red"))
    two = [said(await rest_of(seeing.submit(await shown(seeing, pair, ("a", "b", "c"))))) for pair in pairs]
    assert two[0] != two[1], "their order counts"
    assert seeing.held == (0, 0), "no task and no cell is left"


async def test_a_process_of_its_own_sees_the_same(tmp_path: Path, base: Path, seeing: LlamaEngine) -> None:
    with closing(ProcessEngine(projecting(base, tiny_projector(tmp_path / "apart.gguf")))) as apart:
        for colour in ("red", "blue"):
            answers = [said(await rest_of(each.submit(await shown(each, [colour])))) for each in (seeing, apart)]
            assert answers[0] == answers[1]
        task, struck = await shown(apart, ["red"]), apart.pid
        with pytest.raises(ImageRefused):
            await read(apart, b"no picture")
        assert struck is not None
        os.kill(struck, signal.SIGSEGV)
        await until(lambda: apart.pid not in (None, struck), 120)
        with pytest.raises(EngineLost):  # its process kept the picture
            apart.submit(task)
        assert said(await rest_of(apart.submit(await shown(apart, ["red"]))))


async def test_pictures_of_any_size_take_the_same_place(seeing: LlamaEngine) -> None:
    for size in ((1, 1), (200, 1), (1, 200), (3, 2), (4000, 20), (1000, 1000)):
        assert (await read(seeing, picture("red", size))).tokens == TOKENS


async def test_a_closed_engine_reads_no_more(tmp_path: Path, base: Path) -> None:
    engine = load(base, tiny_projector(tmp_path / "own.gguf"))
    engine.close()
    with pytest.raises(EngineClosed):
        await read(engine, picture("red"))


async def test_a_picture_counts_into_the_prompt(seeing: LlamaEngine) -> None:
    task = await shown(seeing, ["red"], ("look: ", "x" * 300))
    events = await rest_of(seeing.submit(task))
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert finish.prompt_tokens == len(task.prompt) == 6 + TOKENS + 300
    assert (finish.cached_tokens, finish.completion_tokens) == (0, 12)
    assert any(isinstance(event, PromptProgress) for event in events)


async def test_streams_in_the_slots_go_on_and_say_the_same(seeing: LlamaEngine) -> None:
    plain = Task(id="plain", prompt=tuple(seeing.tokenize("hello")), max_tokens=200, sampling=GREEDY)
    alone = said(await rest_of(seeing.submit(plain)))
    seen_alone = said(await rest_of(seeing.submit(await shown(seeing, ["red"], max_tokens=40))))
    task = await shown(seeing, ["red"], max_tokens=40)
    both = await asyncio.gather(rest_of(seeing.submit(plain)), rest_of(seeing.submit(task)))
    assert [*map(said, both)] == [alone, seen_alone]


async def test_an_answer_is_resumed_at_the_same_token(seeing: LlamaEngine) -> None:
    whole = said(await rest_of(seeing.submit(await shown(seeing, ["red"], max_tokens=30))))
    for cut in (1, 7, 29):
        task = await shown(seeing, ["red"], max_tokens=30 - cut, begun=tuple(whole[:cut]))
        assert said(await rest_of(seeing.submit(task))) == whole[cut:]


async def test_stops_and_choices_and_seeds_hold(seeing: LlamaEngine) -> None:
    whole = await rest_of(seeing.submit(await shown(seeing, ["red"], max_tokens=30)))
    text = "".join(event.text for event in whole if isinstance(event, Token | Finish))
    middle = next(letter for letter in text[3:] if letter.isascii() and letter not in text[:3])
    stopped = await rest_of(seeing.submit(await shown(seeing, ["red"], max_tokens=30, stop=(middle,))))
    assert isinstance(stopped[-1], Finish) and stopped[-1].reason == "stop" and stopped[-1].stop == middle
    drawn = Sampling(temperature=1, seed=7)
    one = await shown(seeing, ["red"], sampling=drawn)
    streams = seeing.submit_all([replace(one, id="a", group="g"), replace(one, id="b", group="g")])
    first, second = await asyncio.gather(*map(rest_of, streams))
    assert said(first) == said(second)


async def test_a_cancelled_task_ends_waiting_or_running(seeing: LlamaEngine) -> None:
    one = await shown(seeing, ["red"], max_tokens=400)
    running, waiting = seeing.submit_all([replace(one, id="running"), replace(one, id="waiting")])
    assert isinstance(await anext(running), Token | PromptProgress)
    for name, stream in (("waiting", waiting), ("running", running)):
        seeing.cancel(name)
        finish = (await rest_of(stream))[-1]
        assert isinstance(finish, Finish) and finish.reason == "cancelled"
    assert seeing.held == (0, 0)


async def test_closing_ends_its_tasks(tmp_path: Path, base: Path) -> None:
    engine = load(base, tiny_projector(tmp_path / "own.gguf"))
    task = await shown(engine, ["red"], max_tokens=400)
    streams = engine.submit_all([replace(task, id="one"), replace(task, id="two")])
    await asyncio.to_thread(engine.close)
    for stream in streams:
        finish = (await rest_of(stream))[-1]
        assert isinstance(finish, Finish) and finish.reason in ("cancelled", "length")


async def test_what_no_prompt_can_be_is_refused(seeing: LlamaEngine, tmp_path: Path, base: Path) -> None:
    task = await shown(seeing, ["red"])
    for wrong in (
        replace(task, prompt=task.prompt[: task.images[0].at + TOKENS]),
        replace(task, images=(*task.images, *task.images)),
        replace(task, given=(5,), max_tokens=1),
    ):
        with pytest.raises(TaskRefused) as refused:
            seeing.submit(wrong)
        assert refused.value.field == "images"
    with closing(LlamaEngine(base, name="blind", digest="sha256:0", settings=SMALL)) as blind:
        with pytest.raises(TaskRefused, match="reads no images"):
            blind.submit(task)


async def test_an_adapter_changes_the_answer_of_a_picture(tmp_path: Path, base: Path) -> None:
    lora = tiny_lora(tmp_path / "lora.gguf")
    with closing(load(base, tiny_projector(tmp_path / "own.gguf"), adapters=[AdapterFile("lora", lora, "sha256:2")])) as engine:
        task = await shown(engine, ["red"])
        plain = said(await rest_of(engine.submit(task)))
        adapted = said(await rest_of(engine.adapted[0].submit(task)))
        assert plain != adapted and engine.adapted[0].model.images is engine.model.images
        assert said(await rest_of(engine.submit(task))) == plain


def test_mtmd_says_which_file_it_cannot_load(tmp_path: Path, base: Path) -> None:
    odd = tiny_projector(tmp_path / "odd.gguf", more={"clip.projector_type": "of tomorrow"})
    with pytest.raises(SettingsError, match="unknown projector type") as refused:
        load_engine(projecting(base, odd))
    assert str(odd) in str(refused.value)


def test_marks_that_the_vocabulary_lacks_are_found_before_any_picture(tmp_path: Path, base: Path) -> None:
    """mtmd ends the process at the first picture otherwise."""
    kind = {
        "clip.projector_type": "idefics3", "clip.vision.projector.scale_factor": 2, "clip.vision.preproc_image_size": 64,
    }  # fmt: skip
    tensors = {"mm.model.fc.weight": np.ones((N_EMBD, 128)), "v.post_ln.weight": np.ones(32), "v.post_ln.bias": np.zeros(32)}
    with pytest.raises(SettingsError, match="vocabulary lacks"):
        load_engine(projecting(base, tiny_projector(tmp_path / "marked.gguf", more=kind, tensors=tensors)))


# Through the API


def asked(*colours: Any, path: str = CHAT, text: str = "what is it?") -> dict[str, Any]:
    images = [base64.b64encode(picture(colour)).decode() for colour in colours]
    if path.startswith("/v1/messages"):
        shown = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}} for data in images]
        said = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        return {"model": "tiny", "messages": said, **({} if path.endswith("count_tokens") else {"max_tokens": 8})}
    if path.startswith("/v1/responses"):
        content = [{"type": "input_image", "image_url": f"data:image/png;base64,{data}"} for data in images]
        return {"model": "tiny", "input": [{"role": "user", "content": [*content, {"type": "input_text", "text": text}]}]}
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in images]
    said = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": "tiny", "messages": said, **({} if path in COUNTS else {"max_tokens": 8, "temperature": 0})}


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
async def test_each_api_shows_the_model_its_pictures(seeing: LlamaEngine, path: str) -> None:
    app = create_app([seeing])
    replies = [await post(app, path, asked(*colours, path=path)) for colours in ((), ("red",), ("red", "blue"))]
    assert [reply.status for reply in replies] == [200, 200, 200], replies[-1].body
    usages = [reply.json()["usage"] for reply in replies]
    counts = [usage.get("prompt_tokens", usage.get("input_tokens")) for usage in usages]
    assert [count - counts[0] for count in counts] == [0, TOKENS, 2 * TOKENS]


@pytest.mark.parametrize("path", COUNTS)
async def test_pictures_count_before_the_request_is_made(seeing: LlamaEngine, path: str) -> None:
    app = create_app([seeing])
    bare, one = [(await post(app, path, asked(*colours, path=path))).json() for colours in ((), ("red",))]
    name = "count" if path == "/v1/tokenize" else "input_tokens"
    assert one[name] - bare[name] == TOKENS


async def test_chats_differ_by_their_picture(seeing: LlamaEngine) -> None:
    app = create_app([seeing])
    answers = [(await post(app, CHAT, asked(colour))).json()["choices"][0]["message"] for colour in ("red", "blue", "red")]
    assert answers[0] == answers[2] != answers[1]


async def test_streams_choices_and_schemas_hold(seeing: LlamaEngine) -> None:
    app = create_app([seeing])
    colour = {"properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"], "additionalProperties": False}
    schema = {"type": "object", **colour}
    named = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}}
    body = asked("red") | {"max_tokens": 200, "response_format": named}
    whole = (await post(app, CHAT, body)).message()["content"]
    assert json.loads(whole)["colour"] in ("red", "blue")
    assert (await post(app, CHAT, body | {"stream": True})).message()["content"] == whole
    both = (await post(app, CHAT, body | {"n": 2})).json()
    assert [choice["message"]["content"] for choice in both["choices"]] == [whole, whole]
    assert (
        both["usage"]["prompt_tokens"] == (await post(app, "/v1/tokenize", asked("red", path="/v1/tokenize"))).json()["count"]
    )


async def test_the_list_of_models_says_what_each_reads(seeing: LlamaEngine) -> None:
    reply = await post(create_app([seeing]), "/v1/models", b"", method="GET")
    (model,) = reply.json()["data"]
    assert model["architecture"] == {
        "modality": "text+image->text", "input_modalities": ["text", "image"], "output_modalities": ["text"],
    }  # fmt: skip


async def test_ceilings_hold_for_pictures(seeing: LlamaEngine) -> None:
    app = create_app([seeing])
    granted = Call("x", action="chat", model="tiny", max_tokens=8, max_prompt_tokens=TOKENS)
    reply = await post(app, CHAT, asked("red"), call=granted)
    assert reply.status == 403 and reply.json()["error"]["code"] == "grant_mismatch"
    many = await post(app, CHAT, asked(*["red"] * 16, text="x" * 300))
    assert many.status == 400 and many.json()["error"]["code"] == "context_length_exceeded"


async def test_a_picture_whose_head_alone_is_right_is_refused_by_its_place(seeing: LlamaEngine) -> None:
    whole = picture("red")
    body = asked("red")
    data = base64.b64encode(whole[:40]).decode()
    body["messages"][0]["content"][0]["image_url"]["url"] = f"data:image/png;base64,{data}"
    error = (await post(create_app([seeing]), CHAT, body)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_image", "messages[0].content[0]")
    assert error["message"] == "Invalid 'messages[0].content[0]': it is broken, or cut off."


async def test_it_hears_nothing(seeing: LlamaEngine) -> None:
    body = asked()
    wav = base64.b64encode(b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)).decode()
    body["messages"][0]["content"].insert(0, {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}})
    error = (await post(create_app([seeing]), CHAT, body)).json()["error"]
    assert error["message"].startswith("The model `tiny` takes no audio")


async def test_an_explanation_is_of_texts_alone(seeing: LlamaEngine) -> None:
    body = {"model": "tiny", "messages": asked("red")["messages"], "max_tokens": 4}
    reply = await post(create_app([seeing]), "/v1/explain", body)
    assert reply.status == 400 and "takes no images" in reply.json()["error"]["message"], reply.body


async def test_a_template_that_loses_a_picture_is_refused(tmp_path: Path) -> None:
    twice = "{% for m in messages %}{{ m.content }}{% if 'again' in m.content %}{{ m.content }}{% endif %}{% endfor %}<s>"
    base = tiny_model(tmp_path / "twice.gguf", n_ctx=512, template=twice)
    with closing(load(base, tiny_projector(tmp_path / "own.gguf"))) as engine:
        app = create_app([engine])
        assert (await post(app, CHAT, asked("red"))).status == 200
        error = (await post(app, CHAT, asked("red", text="again"))).json()["error"]
        assert "does not show each image once" in error["message"]
