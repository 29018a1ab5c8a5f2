"""A caller's text meets llama.cpp's tokenizers in a process of its own: it may end that one, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lacre.errors import SettingsError
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import EngineClosed, EngineError, TextRefused
from lacre_backend.engine.tokenizer import LONG_AT_ONCE, SHORT, Tokenizer
from lacre_backend.engine.tokenizer_process import LENGTH, NO_PROCESS
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.settings import ModelSettings
from parts.pre_tokenizers import MODELS, PRE_TOKENIZERS, UNSPELLED, VERSION, hard_texts
from parts.tiny_model import PRINTABLE, tiny_model, tiny_vocabulary

CRASHING = "!" * 1_000_000  # recurses once for each character in a vocabulary of this kind:
FRAGILE = tiny_vocabulary("gpt2", "falcon")
SLOW = "1" * 120_000  # takes the square of its length in a vocabulary of this kind:
SQUARE = tiny_vocabulary("gpt2", "superbpe")


def tokenizer_of(folder: Path, vocabulary: Any = None) -> closing[Tokenizer]:
    return closing(Tokenizer(tiny_model(folder / "m.gguf", vocabulary=vocabulary)))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Iterator[Tokenizer]:
    with tokenizer_of(tmp_path) as tokenizer:
        yield tokenizer


def spelled(vocabulary: dict[str, list[str]], ids: list[int]) -> str:
    """The text that tokens stand for, in a vocabulary of printable characters."""
    written = "".join(vocabulary["tokenizer.ggml.tokens"][i] for i in ids)
    return bytes(PRINTABLE.index(character) for character in written).decode()


def test_the_list_of_pre_tokenizers_is_that_of_the_locked_llama_cpp() -> None:
    assert importlib.metadata.version("llama-cpp-python") == VERSION, "list the pre-tokenizers anew, in parts/pre_tokenizers.py"
    assert len(set(PRE_TOKENIZERS)) == 91


async def check_pre_tokenizer(folder: Path, pre: str, length: int) -> list[str]:
    """Tokenizes what is hard, compares each with the text, and gives what was refused."""
    vocabulary = tiny_vocabulary("gpt2", pre)
    refused = []
    with tokenizer_of(folder, vocabulary) as tokenizer:
        for text in hard_texts(length):
            try:
                (ids,) = await tokenizer.tokens([text])
            except TextRefused:
                refused.append(text[:2])
                continue
            if pre not in UNSPELLED:
                assert spelled(vocabulary, ids) == text, pre
        known = vocabulary["tokenizer.ggml.tokens"]
        assert await tokenizer.tokens(["a", "aa"]) == [[known.index("a")], [known.index("aa")]]
    return refused


@pytest.mark.parametrize("pre", ["falcon", "gpt-4o", "exaone-moe", "llama-bpe"])
async def test_long_runs_have_the_right_tokens(tmp_path: Path, pre: str) -> None:
    assert await check_pre_tokenizer(tmp_path, pre, 60_000) == []


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
async def test_every_pre_tokenizer_stands_long_runs(tmp_path: Path, pre: str) -> None:
    if pre == "whitespace":  # asserts that no two spaces stand side by side: no model, but a wrongly made file
        with pytest.raises(SettingsError, match="GGML_ASSERT"):
            await check_pre_tokenizer(tmp_path, pre, 20_000)
    else:  # superbpe takes the square of a run of digits: whether it is in time depends on the machine
        assert set(await check_pre_tokenizer(tmp_path, pre, 20_000)) <= ({"11"} if pre == "superbpe" else set())


@pytest.mark.parametrize("model", MODELS)
async def test_every_kind_of_vocabulary_stands_long_runs(tmp_path: Path, model: str) -> None:
    with tokenizer_of(tmp_path, tiny_vocabulary(model)) as tokenizer:
        for text in hard_texts(20_000):
            assert len(await tokenizer.tokens([text])) == 1
        assert await tokenizer.tokens(["a", "", "a"]) == [tokenizer.words("a"), [], tokenizer.words("a")]


@pytest.mark.parametrize(
    ("vocabulary", "without", "cause"),
    [
        (tiny_vocabulary("llama"), ["<0x41>"], "SIGABRT"),
        (tiny_vocabulary("llama"), ["<0xC3>"], "SIGABRT"),
        (tiny_vocabulary("plamo2"), ["<0xFF>"], "Byte token"),
        (tiny_vocabulary("rwkv"), ["\\x61"], "SIG"),  # a loop without an end, in time or in memory
        (tiny_vocabulary("gpt2", "no-such"), [], "unknown pre-tokenizer type: 'no-such'"),
        ({**tiny_vocabulary("llama"), "tokenizer.ggml.model": "no-such"}, [], "unknown tokenizer: 'no-such'"),
    ],
    ids=["byte", "byte of a longer character", "plamo2", "rwkv", "pre-tokenizer", "model"],
)
def test_a_file_whose_tokenizer_fails_is_refused_while_it_loads(
    tmp_path: Path, vocabulary: dict[str, object], without: list[str], cause: str
) -> None:
    path = tiny_model(tmp_path / "broken.gguf", vocabulary=vocabulary, without=without)
    with pytest.raises(SettingsError, match=r"broken\.gguf") as raised:
        load_engine(ModelSettings(path=path, threads=1))
    assert cause in str(raised.value)


async def test_a_text_that_ends_its_process_is_refused_alone(tmp_path: Path) -> None:
    with tokenizer_of(tmp_path, FRAGILE) as tokenizer:
        good = tokenizer.words("a")
        texts = (["a"], [CRASHING], ["a", CRASHING], ["a"])
        found = await asyncio.gather(*map(tokenizer.tokens, texts), return_exceptions=True)
        assert [found[0], found[3]] == [[good], [good]]
        assert isinstance(found[1], TextRefused) and isinstance(found[2], TextRefused)
        with pytest.raises(TextRefused):
            tokenizer.words(CRASHING)


async def test_a_slow_text_ends_at_its_limit_and_holds_up_nobody(tmp_path: Path) -> None:
    with tokenizer_of(tmp_path, SQUARE) as tokenizer:
        slow = [asyncio.create_task(tokenizer.tokens([SLOW])) for _ in range(LONG_AT_ONCE + 1)]
        await asyncio.sleep(0)
        for _ in range(3):
            assert await tokenizer.tokens(["a" * (SHORT // 2)])
        assert not any(task.done() for task in slow), "short texts do not wait for long ones"
        for found in await asyncio.gather(*slow, return_exceptions=True):
            assert isinstance(found, TextRefused)


async def test_a_text_whose_caller_left_is_given_up(tmp_path: Path) -> None:
    with tokenizer_of(tmp_path, SQUARE) as tokenizer:
        asking = asyncio.create_task(tokenizer.tokens([SLOW]))
        while not (forks := tokenizer.forks()):
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(15):
            while forks & tokenizer.forks():
                await asyncio.sleep(0.01)


async def test_a_caller_who_leaves_as_its_connection_is_made_loses_none(tokenizer: Tokenizer) -> None:
    """A connection that nobody closes is an error here: `filterwarnings`."""
    while not (await asyncio.to_thread(tokenizer.forks)):  # who leaves before a thread began has made no connection
        leaving = asyncio.create_task(tokenizer.tokens(["a"]))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert await tokenizer.tokens(["a"])
    gc.collect()


async def test_the_process_starts_again(tokenizer: Tokenizer) -> None:
    before = await tokenizer.tokens(["sea"])
    os.kill(tokenizer.pid, signal.SIGKILL)
    for _ in range(3):
        assert await tokenizer.tokens(["sea" * SHORT]) == [before[0] * SHORT]
    tokenizer.close()
    with pytest.raises(EngineClosed):
        await tokenizer.tokens(["sea"])


async def test_a_text_is_not_to_blame_for_what_ended_before_it_came(tokenizer: Tokenizer) -> None:
    """A fork that waits for the next text is the first to go where memory is short."""
    before = await tokenizer.tokens(["sea"])
    for pid in (waiting := tokenizer.forks()):
        os.kill(pid, signal.SIGKILL)
    while waiting & tokenizer.forks():
        await asyncio.sleep(0.01)
    assert waiting and await tokenizer.tokens(["sea"]) == before


async def test_a_lack_of_processes_is_said(tokenizer: Tokenizer) -> None:
    """The text is not to blame for that either: what can be tried again is told apart. For root there is no such limit."""
    if os.geteuid() == 0:
        ours, theirs = socket.socketpair()
        tokenizer._keep(ours)
        theirs.setblocking(False)
        asking = asyncio.create_task(tokenizer.tokens(["sea"]))
        assert await asyncio.get_running_loop().sock_recv(theirs, 1)
        theirs.send(LENGTH.pack(NO_PROCESS))
        theirs.close()
    else:
        limits = resource.prlimit(tokenizer.pid, resource.RLIMIT_NPROC)
        resource.prlimit(tokenizer.pid, resource.RLIMIT_NPROC, (1, limits[1]))
        asking = asyncio.create_task(tokenizer.tokens(["sea"]))
    with pytest.raises(EngineError, match="cannot start a process"):
        await asking


async def test_signals_for_the_whole_group_are_the_workers(tokenizer: Tokenizer) -> None:
    """Ctrl-C and a service manager's SIGTERM reach it too, while the worker drains."""
    before, pid = await tokenizer.tokens(["sea"]), tokenizer.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in (pid, *tokenizer.forks()):
            os.kill(process, number)
    assert await tokenizer.tokens(["sea"]) == before
    assert tokenizer.pid == pid


def test_nothing_of_it_is_left_behind(tmp_path: Path) -> None:
    engine = LlamaEngine(tiny_model(tmp_path / "m.gguf"), name="m", digest="sha256:0")
    assert engine.tokenize("sea") and Path(f"/proc/{engine.tokenizer.pid}").exists()
    engine.close()
    assert not Path(f"/proc/{engine.tokenizer.pid}").exists()
