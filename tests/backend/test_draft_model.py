"""Draft models: they guess as if they had read only the answer so far, and only with the served model's vocabulary."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.generating import GREEDY, made, make_task, run
from backend.guessing import PROMPTS, SPLIT, UNIFIED, alike, counts, eager, engine_of, without
from lacre.errors import SettingsError
from lacre_backend.commands.check import _held
from lacre_backend.engine.context import Compute
from lacre_backend.engine.draft_model import DraftFile, DraftModel, DraftVocabularyDiffers
from lacre_backend.engine.drafting import Wanted
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.model import Gpu
from lacre_backend.engine.tokens import Tokens
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.models import gguf
from lacre_backend.node.readiness import Reason
from lacre_backend.serve import served
from lacre_backend.settings import ModelSettings, WorkerSettings
from lacre_backend.workshop.sealing import seal_model
from parts.tiny_model import tiny_model, tiny_recurrent_model, tiny_vocabulary


@pytest.mark.parametrize("settings", [SPLIT, UNIFIED], ids=["split", "unified"])
@pytest.mark.parametrize("seed", [1, 2], ids=["the model itself", "another of its vocabulary"])
async def test_a_draft_model(tiny: Path, tmp_path: Path, settings: LlamaSettings, seed: int) -> None:
    draft = DraftFile(tiny_model(tmp_path / "draft.gguf", seed=seed, n_ctx=256), "draft.gguf")
    with engine_of(tiny, dataclasses.replace(settings, speculation="draft"), draft=draft) as engine:
        eager(engine)
        tasks = [make_task(engine, text, 40, sampling=GREEDY, logprobs=0) for text in (*PROMPTS, "long " * 70)]
        with without(engine):
            plain = [await run(engine, task) for task in tasks]
        again = [dataclasses.replace(task, id=task.id + "-again") for task in tasks]
        guessed = await asyncio.gather(*(run(engine, task) for task in again))
        for one, other in zip(plain, guessed, strict=True):
            alike(one, other)
        assert counts(engine).guessed > 40
        if seed == 1:
            assert counts(engine).acceptance > 0.9, "its own guesses are right"
        assert engine.held == (0, 0)
        alike(plain[0], await run(engine, dataclasses.replace(tasks[0], id="alone")))


async def test_a_draft_model_keeps_no_cells_of_ended_tasks(tiny: Path) -> None:
    with engine_of(tiny, dataclasses.replace(SPLIT, speculation="draft"), draft=DraftFile(tiny, "tiny.gguf")) as engine:
        eager(engine)
        for text in PROMPTS * 2:  # more than it has sequences
            await made(engine, text, 12, sampling=GREEDY)
        assert engine.speculation is not None
        drafter: Any = engine.speculation._drafter
        assert (drafter._tasks, sorted(drafter._free)) == ({}, [0, 1, 2, 3])


def read(draft: DraftModel, task: Wanted) -> list[int]:
    """Its guesses, once it has read all."""
    for _ in range(len(task.tokens)):
        if found := draft.draft([task]):
            return found[task.id]
    raise AssertionError("each call reads at least a token")


def test_a_draft_model_takes_wrong_guesses_back(tiny: Path) -> None:
    """However an answer went on: it guesses what it would guess if it had read only that."""
    with engine_of(tiny, SPLIT) as engine:
        limits = dataclasses.replace(engine._scheduler.limits, slots=2, cells=1024)
        draft, fresh = (DraftModel(DraftFile(tiny, "tiny.gguf"), engine._model, limits, Compute(1), Gpu()) for _ in range(2))
        chance = random.Random(2)
        answers = {name: Tokens(engine.tokenize(text)) for name, text in zip("ab", PROMPTS, strict=False)}
        for step in range(40):
            for name, tokens in answers.items():
                task = Wanted(name, tokens, chance.randint(1, 5), able=True)
                guesses = read(draft, task)
                assert guesses == read(fresh, task)
                np.testing.assert_allclose(draft._context.logits(1), fresh._context.logits(1), atol=0.05)
                fresh.forget(name)
                right = chance.randint(0, task.most)  # of them, and then other tokens
                for token in [*guesses[:right], *(chance.randrange(3, 200) for _ in range(chance.randint(1, 3)))]:
                    tokens.append(token)
            if step == 20:
                draft.forget("a")
        draft.close()
        fresh.close()


def test_a_draft_of_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary("llama")
    tokens = vocabulary["tokenizer.ggml.tokens"]
    i, j = tokens.index("<0x41>"), tokens.index("<0x42>")
    tokens[i], tokens[j] = tokens[j], tokens[i]
    other = tiny_model(tmp_path / "other.gguf", vocabulary=vocabulary)
    with pytest.raises(DraftVocabularyDiffers, match=r"other\.gguf has another vocabulary.*: 2 tokens differ, such as 68, 69"):
        load_engine(ModelSettings(path=tiny, threads=1, speculation="draft", draft_model=other))
    with pytest.raises(DraftVocabularyDiffers, match="not one vocabulary"):
        load_engine(ModelSettings(path=tiny, threads=1, speculation="draft", draft_model=gguf.find().path))


def worker(tmp_path: Path, **model: Any) -> WorkerSettings:
    usual = {"pool": "p", "node": "n", "trust": "A" * 43, "keys": "keys", "receipt_key": "k"}
    nats = {"url": "nats://127.0.0.1:4222", "credentials": "c"}
    return WorkerSettings.model_validate(usual | {"nats": nats, "models": [model]}, context={"folder": tmp_path})


def test_the_workers_own_check_compares_vocabularies(tiny: Path, tmp_path: Path) -> None:
    for draft, kinds in ((tiny_model(tmp_path / "other.gguf", seed=2), ["keys"]), (gguf.find().path, ["model", "keys"])):
        found: list[Reason] = []
        _held(worker(tmp_path, path=tiny, speculation="draft", draft_model=draft), found)
        assert [reason.kind for reason in found] == kinds
        assert any("not one vocabulary" in reason.detail for reason in found) == ("model" in kinds)


async def test_a_worker_with_a_sealed_draft_says_what_its_guesses_were_worth(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kms.key").write_bytes(secrets.token_bytes(32))
    (tmp_path / "kms.key").chmod(0o600)
    kms = f"file:{tmp_path / 'kms.key'}"
    sealed = tmp_path / "draft.lacre"
    seal_model(tiny, sealed, kms, lambda _what, _share: None)
    table = {"path": tiny, "context": 256, "slots": 2, "threads": 1, "speculation": "draft", "draft_model": sealed}
    settings = worker(tmp_path, **table).model_copy(update={"kms": kms})
    engine = load_engine(settings.models[0], kms)
    assert isinstance(engine, LlamaEngine)
    with contextlib.closing(eager(engine)):
        alike(*[await made(engine, PROMPTS[0], 20, sampling=GREEDY, logprobs=0) for _ in range(2)])
        assert counts(engine).acceptance > 0.9
    async with AsyncExitStack() as own:
        served(settings, own)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "worker.speculation" in line]
    assert [(line["model"], line["number"], line["accepted"]) for line in lines] == [("tiny", 0, 0)], "its process says it"
    plain = table | {"path": sealed, "draft_model": tiny, "sealed": True}
    with pytest.raises(SettingsError, match="not sealed"):  # the draft must meet what the model must
        load_engine(worker(tmp_path, **plain).models[0], kms)


def test_settings_that_cannot_speculate(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the GGUF file of a draft model"):
        ModelSettings(path=tiny, speculation="draft")
    recurrent = tiny_recurrent_model(tmp_path / "recurrent.gguf")
    with pytest.raises(SettingsError, match="cannot take back wrong guesses"):
        load_engine(ModelSettings(path=recurrent, threads=1, speculation="lookup"))
    with pytest.raises(SettingsError, match="cannot draft"):
        load_engine(ModelSettings(path=tiny, threads=1, speculation="draft", draft_model=recurrent))
