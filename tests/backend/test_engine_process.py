"""An engine in a process of its own: its crash ends its requests and nothing else, and it holds what nothing else may hold."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from backend.generating import GREEDY, made, make_task, rest_of, run
from backend.test_sealed_memory import files_held_by, slices
from lacre.errors import AppLost, LacreError, SettingsError
from lacre_backend.api.app import create_app
from lacre_backend.engine.embed import LlamaEmbedder, LlamaReranker
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineLost,
    Event,
    Finish,
    GrammarTooLarge,
    Task,
    TaskKind,
    TaskRefused,
    Token,
)
from lacre_backend.engine_process import engine as room
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.engine_process.messages import ModelKey, framed
from lacre_backend.models.sealed import message_context, read_head
from lacre_backend.settings import ModelSettings
from lacre_backend.workshop.sealing import seal_model
from lacre_fabric.keys.kms import connect
from parts.memory import found_in_memory
from parts.tiny_model import tiny_lora, tiny_model, tiny_reranker
from parts.up import alive, descendants, wait_until_gone
from parts.waiting import until, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE = 120.0  # seconds; the machine may be busy


def settings(path: Path, **fields: Any) -> ModelSettings:
    return ModelSettings(**{"path": path, "name": "tiny", "context": 512, "slots": 4, "threads": 1, **fields})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def engine(model: Path) -> Iterator[ProcessEngine]:
    with closing(ProcessEngine(settings(model))) as made:
        yield made


def strike(engine: ProcessEngine, number: signal.Signals = signal.SIGSEGV) -> int:
    """Kills its process, whose id it returns."""
    pid = engine.pid
    assert pid is not None
    os.kill(pid, number)
    return pid


async def back(engine: ProcessEngine, after: int) -> None:
    await until(lambda: engine.pid not in (None, after), PATIENCE)


async def outcome(stream: AsyncIterator[Event]) -> Event | LacreError:
    """The last event of a stream, or its error."""
    try:
        return (await rest_of(stream))[-1]
    except LacreError as exc:
        return exc


# Crashes


async def test_a_crash_ends_its_streams_and_it_comes_back(engine: ProcessEngine) -> None:
    before = await made(engine, max_tokens=8, sampling=GREEDY)
    streams = [engine.submit(make_task(engine, max_tokens=400)) for _ in range(6)]  # running ones, and waiting ones
    assert isinstance(await anext(streams[0]), Token)
    struck = strike(engine)
    for stream in streams:
        end = await outcome(stream)
        assert isinstance(end, EngineLost) and end.begun
        assert [event async for event in stream] == [], "and nothing after that"
    await back(engine, struck)
    assert not engine.died and engine.fault is None
    after = await made(engine, max_tokens=8, sampling=GREEDY)
    assert (after.ids, after.text) == (before.ids, before.text)


async def test_the_first_restart_waits_for_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short its process lived. The delays are for those that end again at once."""
    for name in ("AGAIN", "AGAIN_MOST", "AGAIN_CRASHED", "SETTLED"):
        monkeypatch.setattr(room, name, 1e6)
    with closing(ProcessEngine(settings(model))) as engine:
        await back(engine, strike(engine))


async def test_while_there_is_no_process_every_call_says_so(engine: ProcessEngine, model: Path) -> None:
    task, grammar = make_task(engine, max_tokens=4), engine.grammar('start: "a"')
    await asyncio.to_thread(model.rename, model.with_suffix(".away"))
    try:
        strike(engine)
        await until(lambda: engine.fault is not None and "started" in engine.fault, PATIENCE)
        assert engine.pid is None
        with pytest.raises(EngineLost, check=lambda lost: not lost.begun):
            engine.submit(task)
        with pytest.raises(EngineLost):
            engine.tokenize("a")
        with pytest.raises(EngineLost):
            await engine.tokens(["a"])
        with pytest.raises(EngineLost):
            engine.grammar('start: "a"')
        engine.cancel("any")
        assert engine.released(task.prompt) != [], "that needs no process"
        assert str(model) in str(engine.fault)
    finally:
        await asyncio.to_thread(model.with_suffix(".away").rename, model)
    await until(lambda: engine.pid is not None, PATIENCE)
    with pytest.raises(EngineLost):  # its process kept it
        engine.submit(dataclasses.replace(task, sampling=dataclasses.replace(GREEDY, grammar=grammar)))
    assert (await run(engine, task)).finish.completion_tokens == 4


async def test_another_model_in_the_files_place_is_not_served(tmp_path: Path) -> None:
    path, other = tiny_model(tmp_path / "m.gguf"), tiny_model(tmp_path / "other.gguf", seed=2)
    with closing(ProcessEngine(settings(path))) as engine:
        kept = path.read_bytes()
        path.write_bytes(other.read_bytes())
        strike(engine)
        await until(lambda: engine.fault is not None and "have changed" in engine.fault, PATIENCE)
        path.write_bytes(kept)
        await until(lambda: engine.pid is not None, PATIENCE)
        assert engine.fault is None


async def test_what_was_spoken_is_spoken_by_the_next_process(engine: ProcessEngine) -> None:
    token = next(token.id for token in engine.model.control_tokens if token.id not in engine._vocabulary.ends)
    with pytest.raises(TaskRefused):
        engine.submit(make_task(engine, given=(token,), max_tokens=1, sampling=GREEDY, endless=False))
    engine.speak([token])
    for _ in range(2):
        scored = await made(engine, given=(token,), max_tokens=1, sampling=GREEDY, endless=False)
        assert scored.text == "".join(engine.released([token])) != ""
        await back(engine, strike(engine))


@pytest.mark.timeout(1800)
async def test_thirty_crashes_at_random_tokens(engine: ProcessEngine) -> None:
    """Each answer is whole or ends with an error of its kind; the engine is there again after each."""
    chance, whole, lost = random.Random(17), 0, 0
    expected = await made(engine, max_tokens=60, sampling=GREEDY)
    for _ in range(30):
        place = chance.randrange(1, 90)  # beyond its end: the process ends after the answer
        stream, seen, struck = engine.submit(make_task(engine, max_tokens=60, sampling=GREEDY)), list[Event](), None
        try:
            async for event in stream:
                seen.append(event)
                if len(seen) == place:
                    struck = strike(engine)
            assert isinstance(seen[-1], Finish)
            assert [event.id for event in seen if isinstance(event, Token)] == expected.ids
            whole += 1
        except EngineLost as exc:
            assert exc.begun
            ids = [event.id for event in seen if isinstance(event, Token)]
            assert ids == expected.ids[: len(ids)]
            lost += 1
        await back(engine, struck or strike(engine))
    assert whole + lost == 30
    assert lost > 5


async def test_a_process_that_hangs_is_replaced(engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "STUCK", 2.0)
    stream = engine.submit(make_task(engine, max_tokens=400))
    stopped = strike(engine, signal.SIGSTOP)
    assert isinstance(await outcome(stream), EngineLost)
    await back(engine, stopped)
    assert not alive(stopped)


async def test_a_process_that_says_nonsense_is_replaced(engine: ProcessEngine) -> None:
    """Through its own socket, which only root may take from it."""
    pid = engine.pid
    assert pid is not None
    taken = ctypes.CDLL(None).syscall(438, os.pidfd_open(pid), socket_of(pid), 0)  # pidfd_getfd(2)
    if os.geteuid() != 0:
        assert taken == -1, "it may not be traced"
        return
    stream = engine.submit(make_task(engine, max_tokens=400))
    with socket.socket(fileno=taken) as theirs:
        theirs.setblocking(True)
        theirs.sendall(b"\xff" * 64)
    assert isinstance(await outcome(stream), EngineLost)
    await back(engine, pid)


def socket_of(pid: int) -> int:
    """Its file that its command line names."""
    return int(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[4])


# Starts and ends


def test_a_model_that_cannot_be_loaded_is_refused_in_the_same_words(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    before = engines()  # a deployment of other tests may be running
    for path, words in ((tmp_path / "none.gguf", "No such model file"), (broken, "llama.cpp cannot load")):
        with pytest.raises(SettingsError, match=words):
            ProcessEngine(settings(path))
    with pytest.raises(SettingsError, match="is not sealed"):
        ProcessEngine(settings(model, sealed=True))
    assert engines() <= before


def engines() -> set[int]:
    return {pid for pid in descendants(os.getpid()) if is_engine(pid)}


def is_engine(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return alive(pid) and b"engine_process.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_closing_ends_the_process_and_its_tokenizer(model: Path) -> None:
    engine = ProcessEngine(settings(model))
    assert engine.pid is not None
    below = [engine.pid, *descendants(engine.pid)]
    assert len(below) > 1, "the tokenizer has a process of its own"
    engine.close()
    engine.close()
    assert wait_until_gone(below) == []
    with pytest.raises(EngineClosed):
        engine.tokenize("a")


PROGRAM = """
import sys
from pathlib import Path
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.settings import ModelSettings
engine = ProcessEngine(ModelSettings(path=Path(sys.argv[1]), name="m", slots=1, context=64, threads=1), sys.argv[2])
print(engine.pid, flush=True)
sys.stdin.read()
engine.close()
"""


def started(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def pid_of(owner: subprocess.Popen[str]) -> int:
    assert owner.stdout is not None
    return int(owner.stdout.readline())


def test_it_ends_with_the_process_that_started_it(model: Path) -> None:
    with started(str(model), "plain:") as owner:
        pid = pid_of(owner)
        below = [pid, *descendants(pid)]
        owner.kill()
    assert wait_until_gone(below) == []


def test_signals_to_the_group_are_the_owners_affair(model: Path) -> None:
    with started(str(model), "plain:") as owner:
        pid = pid_of(owner)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        wait_until(lambda: pending(pid) == 0, 30)
        assert alive(pid)
        owner.communicate("")
        assert owner.returncode == 0


def pending(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd")))


def test_it_gets_no_secrets_and_leaves_no_core(model: Path) -> None:
    with started(
        str(model), "plain:", AWS_SECRET_ACCESS_KEY="canary-1", VAULT_TOKEN="canary-2", OMP_WAIT_POLICY="passive"
    ) as owner:
        pid = pid_of(owner)
        surroundings = Path(f"/proc/{pid}/environ").read_text() + Path(f"/proc/{pid}/cmdline").read_text()
        assert "canary" not in surroundings
        assert "OMP_WAIT_POLICY=passive" in surroundings
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        owner.communicate("")


def test_sealed_weights_are_in_its_memory_alone(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf")
    needles, kms = slices(model), f"file:{tmp_path / 'kms'}"
    seal_model(model, tmp_path / "tiny.sealed", kms, lambda _what, _share: None)
    model.unlink()
    with started(str(tmp_path / "tiny.sealed"), kms) as owner:
        pid = pid_of(owner)
        assert found_in_memory(pid, needles) == {*needles}
        assert not found_in_memory(owner.pid, needles)
        below = descendants(pid)
        assert below
        assert not any(found_in_memory(each, needles) for each in below)
        held = [content for each in (owner.pid, pid, *below) for content in files_held_by(each)]
        assert not any(needle in content for content in held for needle in needles.values())
        owner.communicate("")
        assert owner.returncode == 0


UNWRAPS = """
import socket, sys
from lacre.wire.wiping import overwrite
from lacre_backend.engine_process.child import KeysOfWorker, Pipe
from lacre_fabric.keys.kms import EncryptionContext
key = KeysOfWorker("file", Pipe(int(sys.argv[1]))).unwrap(b"wrapped", EncryptionContext("model", "", digest="sha256:0"))
overwrite(key)
print(len(key), flush=True)
sys.stdin.read()
"""


def test_a_key_that_crosses_the_socket_leaves_no_copy() -> None:
    """At once, before anything else could take the place of a freed one."""
    key, (ours, theirs) = os.urandom(32), socket.socketpair()
    with ours, theirs:
        ours.sendall(framed(ModelKey(key)))
        command = [sys.executable, "-P", "-c", UNWRAPS, str(theirs.fileno())]
        both = subprocess.PIPE
        with subprocess.Popen(command, stdin=both, stdout=both, text=True, pass_fds=[theirs.fileno()]) as child:
            assert pid_of(child) == len(key), "it had the key"
            assert found_in_memory(child.pid, {"first": key[:16], "last": key[16:]}) == set()
            child.communicate("")


def test_the_key_of_a_sealed_model_does_not_stay(tmp_path: Path) -> None:
    """Neither the one that crossed the socket nor the one that opens the chunks, once the model is loaded."""
    path, address = tmp_path / "tiny.sealed", f"file:{tmp_path / 'kms'}"
    seal_model(tiny_model(tmp_path / "tiny.gguf"), path, address, lambda _what, _share: None)
    head, service = read_head(path), connect(address)
    assert service is not None
    key = bytes(service.unwrap(head.wrapped, head.about.context))
    salt = path.read_bytes()[head.at :][:24]
    label = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"
    chunks = HKDFExpand(SHA512(), 32 + 12 + 32, label + salt + message_context(head.core)).derive(key)[:32]
    with started(str(path), address) as owner:
        pid = pid_of(owner)
        for each in (owner.pid, pid, *descendants(pid)):
            assert found_in_memory(each, {"key": key, "chunks": chunks}) == set(), each
        owner.communicate("")
        assert owner.returncode == 0


def test_a_sealed_model_whose_service_has_another_key(tmp_path: Path) -> None:
    seal_model(tiny_model(tmp_path / "t.gguf"), tmp_path / "t.sealed", f"file:{tmp_path / 'a'}", lambda _what, _share: None)
    seal_model(tmp_path / "t.gguf", tmp_path / "u.sealed", f"file:{tmp_path / 'b'}", lambda _what, _share: None)
    with pytest.raises(LacreError, match=r"t\.sealed") as told:
        ProcessEngine(settings(tmp_path / "t.sealed"), f"file:{tmp_path / 'b'}")
    assert type(told.value).__name__ == "WrongWrapping"
    with pytest.raises(SettingsError, match="Give the address"):
        ProcessEngine(settings(tmp_path / "t.sealed"))


# What it computes


async def test_it_says_what_the_same_engine_says_in_this_process(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base.gguf")
    lora = tiny_lora(tmp_path / "lora.gguf")
    own = LlamaSettings(n_ctx=512, slots=4, threads=1)
    sealed = settings(base, adapters={"tax": lora}, speculation="lookup")
    with closing(LlamaEngine(base, name="tiny", digest="", settings=own)) as here, closing(ProcessEngine(sealed)) as there:
        assert [one.model.name for one in there.adapted] == ["tiny:tax"]
        plain = await made(here, max_tokens=12, sampling=GREEDY, logprobs=2)
        apart = await made(there, max_tokens=12, sampling=GREEDY, logprobs=2)
        assert (apart.ids, apart.text, apart.finish) == (plain.ids, plain.text, plain.finish)
        for one, other in zip(plain.tokens, apart.tokens, strict=True):
            assert other.logprob == pytest.approx(one.logprob, abs=0.01)
            assert [each.raw for each in other.top] == [each.raw for each in one.top]
        adapted = await run(there, make_task(there, max_tokens=12, sampling=GREEDY, adapter="tax"))
        assert len(adapted.ids) == 12
        with pytest.raises(TaskRefused):
            there.submit(make_task(there, adapter="none"))
        given = tuple(here.tokenize(" Paris."))
        task = make_task(there, given=given, max_tokens=len(given), sampling=GREEDY, endless=False, lens=2)
        seen = await run(there, task)
        assert [[view.layer for view in token.layers] for token in seen.tokens] == [[0, 1]] * len(given)
        again = await run(here, dataclasses.replace(task, id="here"))
        assert [token.layers[-1].rank for token in seen.tokens] == [token.layers[-1].rank for token in again.tokens]


async def test_a_grammar_holds_and_its_choices_share_it(engine: ProcessEngine) -> None:
    grammar = engine.grammar("start: /[0-9]{3}/")
    first = make_task(engine, max_tokens=9, endless=False, sampling=dataclasses.replace(GREEDY, grammar=grammar))
    choices = [dataclasses.replace(first, id=f"{first.id}.{i}", group=first.id) for i in range(3)]
    for stream in engine.submit_all(choices):
        events = await rest_of(stream)
        text = "".join(event.text for event in events if isinstance(event, Token | Finish))
        assert text.isdigit() and len(text) == 3
    with pytest.raises(TaskRefused):
        engine.submit(dataclasses.replace(first, begun=(5,)))
    with pytest.raises(GrammarTooLarge):
        engine.grammar("no rule here")
    other = dataclasses.replace(first, id="other", group="g", sampling=GREEDY)
    streams = engine.submit_all([other, dataclasses.replace(other, id="different", prompt=other.prompt[:-1])])
    for stream in streams:
        assert isinstance(await outcome(stream), TaskRefused), "what only its process can see"


async def test_embeddings_and_scores_are_the_same(tmp_path: Path) -> None:
    embeds, ranks = tiny_model(tmp_path / "e.gguf", embeds=True), tiny_reranker(tmp_path / "r.gguf")
    for path, kind, action in ((embeds, LlamaEmbedder, TaskKind.EMBED), (ranks, LlamaReranker, TaskKind.RERANK)):
        own = kind(path, name="tiny", digest="", settings=LlamaSettings(n_ctx=256, slots=4, threads=1))
        with closing(own) as here, closing(ProcessEngine(settings(path, context=256))) as there:
            values = []
            for each in (here, there):
                task = Task("one", tuple(each.tokenize("a text to read")), 1, kind=action)
                result, finish = await rest_of(each.submit(task))
                assert isinstance(finish, Finish)
                values.append(result.values)
            assert values[0] == pytest.approx(values[1], abs=1e-5)
            assert there.model.kinds == {action}
            with pytest.raises(TaskRefused):
                there.grammar("start: /a/")


async def test_many_texts_and_callers_that_leave(engine: ProcessEngine) -> None:
    found = await asyncio.gather(*(engine.tokens([f"text {number}", ""]) for number in range(50)))
    assert [len(ids) for ids in found] == [2] * 50
    assert await engine.tokens(["", ""]) == [[], []]
    leaving = [asyncio.create_task(engine.tokens(["x" * 5000])) for _ in range(20)]
    await asyncio.sleep(0)
    for each in leaving:
        each.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    assert await engine.tokens(["after"]) == [engine.tokenize("after")]


async def test_the_api_passes_its_loss_to_the_node(engine: ProcessEngine) -> None:
    """Not as an answer: the node tells the gateway, and the client asks another worker."""
    app = create_app([engine])
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, "stream": True}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://app.test") as client:
        assert (await client.post("/v1/chat/completions", json=body | {"max_tokens": 2})).status_code == 200
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: bool(engine._streams), PATIENCE)
        struck = strike(engine)
        with pytest.raises(AppLost, check=lambda lost: lost.begun):
            await asked
        with suppress(AppLost):  # it may be back already
            await client.post("/v1/chat/completions", json=body | {"max_tokens": 2})
        await back(engine, struck)
        assert (await client.post("/v1/chat/completions", json=body | {"max_tokens": 2})).status_code == 200


async def test_an_id_twice_and_a_closed_engine(engine: ProcessEngine) -> None:
    task = make_task(engine, max_tokens=200)
    stream = engine.submit(task)
    with pytest.raises(TaskRefused, check=lambda refused: refused.field == "id"):
        engine.submit(task)
    engine.cancel(task.id)
    assert isinstance(await outcome(stream), Finish)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineError):
        engine.submit(task)
