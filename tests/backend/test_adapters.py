"""LoRA adapters: which step is whose, what each answers beside the others, and which files are refused."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.generating import GREEDY, made, make_task, run
from backend.posting import TEXT, post
from backend.scheduling import FOUR, SPLIT, Driver
from lacre.asgi import Call, Usage
from lacre.errors import SettingsError
from lacre_backend.api.app import create_app
from lacre_backend.commands.check import _held
from lacre_backend.commands.digests import served_files
from lacre_backend.engine.adapted import adapted_digest
from lacre_backend.engine.adapter_turns import TURN, AdapterTurns, Runner
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.placement import distances
from lacre_backend.engine.plan import EngineLimits, StepPlan
from lacre_backend.engine.protocol import TaskRefused
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.models.opening import find
from lacre_backend.node.readiness import Reason
from lacre_backend.serve import served
from lacre_backend.settings import ModelSettings, WorkerSettings
from lacre_backend.workshop.sealing import seal_model
from parts.tiny_model import tiny_lora, tiny_model

# Turns

PARTIES = st.tuples(st.sampled_from("stu"), st.sampled_from("ab"))
RUNNERS = st.lists(st.tuples(st.sampled_from([None, "x", "y", "z"]), PARTIES), min_size=1, max_size=8)


def runners(tasks: list[tuple[str | None, tuple[str, str]]]) -> list[Runner]:
    return [Runner(adapter, fair, number) for number, (adapter, fair) in enumerate(tasks)]


@given(RUNNERS, st.lists(RUNNERS, max_size=12))
def test_no_adapter_starves(tasks: list[Any], before: list[Any]) -> None:
    """However others came and went before: each one computes after its turn among tenants, callers and adapters."""
    turns, running = AdapterTurns(), runners(tasks)
    for others in before:
        turns.next(runners(others))
    wanted = {runner.adapter for runner in running}
    fairs = {runner.fair for runner in running}
    callers = max(Counter(tenant for tenant, _ in fairs).values())
    rounds = len(wanted) * callers * len({tenant for tenant, _ in fairs})
    seen = [turns.next(running) for _ in range(TURN * (rounds + 1))]
    assert set(seen) == wanted


def test_a_party_gains_nothing_by_many_adapters() -> None:
    running = runners([("x", ("s", "a")), ("y", ("s", "a")), ("z", ("s", "b")), (None, ("t", "a"))])
    turns = AdapterTurns()
    seen = [turns.next(running) for _ in range(40 * TURN)]
    assert seen.count(None) == 20 * TURN
    assert seen.count("z") == 10 * TURN
    assert all(seen[i * TURN : (i + 1) * TURN] == [seen[i * TURN]] * TURN for i in range(40)), "a turn has several steps"


@given(st.integers(2, 6), st.lists(RUNNERS, max_size=6))
def test_a_callers_adapters_wait_for_one_turn_of_each_other(count: int, before: list[Any]) -> None:
    """Between two steps of an adapter there are at most `TURN` steps of each of the others."""
    turns = AdapterTurns()
    for others in before:
        turns.next(runners(others))
    running = runners([(f"a{i}", ("s", "a")) for i in range(count)])
    seen = [turns.next(running) for _ in range(3 * TURN * count)]
    for adapter in {runner.adapter for runner in running}:
        at = [-1, *(i for i, one in enumerate(seen) if one == adapter)]
        assert max(b - a - 1 for a, b in itertools.pairwise(at)) <= TURN * (count - 1)


def test_a_turn_ends_with_its_work() -> None:
    turns = AdapterTurns()
    both, one = runners([("x", ("s", "a")), ("y", ("s", "a"))]), runners([("y", ("s", "a"))])
    assert turns.next(both) == "x"
    assert turns.next(one) == "y"
    assert turns.next([]) is None


# Steps


def of(plan: StepPlan) -> set[str | None]:
    return {segment.task for segment in plan.segments if segment.task is not None}


def test_a_step_has_one_adapters_tasks_and_all_of_them() -> None:
    driver = Driver()
    for name, adapter in (("a", "x"), ("b", None), ("c", "x"), ("d", "y")):
        driver.submit(name, [1, 2, 3], output=30, adapter=adapter)
    driver.run()
    steps = [(plan.adapter, of(plan)) for plan in driver.plans]
    assert {frozenset(names) for _, names in steps} == {frozenset("ac"), frozenset("b"), frozenset("d")}
    first = steps[: 3 * TURN]
    assert {adapter: sum(adapter == one for one, _ in first) for adapter in ("x", "y", None)} == dict.fromkeys(
        ("x", "y", None), TURN
    )


@pytest.mark.parametrize("scope", [b"s", None])
@pytest.mark.parametrize(("computed", "asked"), [(None, "x"), ("x", None), ("x", "y")])
def test_caches_are_kept_apart(scope: bytes | None, computed: str | None, asked: str | None) -> None:
    """In an idle slot and in a running one, though scope and prompt are the same."""
    text = list(range(200))
    for output in (1, 30):
        driver = Driver(FOUR)
        driver.submit("first", [*text, 1], scope, output, adapter=computed)
        driver.step()
        driver.submit("other", [*text, 2], scope, adapter=asked)
        driver.submit("same", [*text, 3], scope, adapter=computed)
        driver.run()
        assert driver.found["other"] == 0
        assert driver.found["same"] == (len(text) if scope else 0)


def test_a_long_prompt_stalls_no_other_adapters_tasks() -> None:
    driver = Driver()
    driver.submit("short", [1, 2], output=60)
    driver.step()
    driver.submit("long", [5] * 100, adapter="x")
    for _ in range(4 * TURN):
        plan = driver.step()
        if plan.adapter == "x":
            assert plan.size <= SPLIT.share + SPLIT.multiple


EIGHT = EngineLimits(slots=8, context=512, cells=4096, multiple=4)


@pytest.mark.parametrize("adapters", [[None], [None, "x"], ["x", None, "y"], [None, "x", "x", "y"]])
def test_an_adapters_tasks_are_neighbours_in_whatever_order_they_come(adapters: list[str | None]) -> None:
    """So no step has a filler, and llama.cpp computes each in one piece."""
    driver = Driver(EIGHT)
    for i in range(8):
        driver.submit(f"t{i}", [1, 2, 3], output=80, adapter=adapters[i % len(adapters)])
        driver.step()
    for _ in range(40):
        plan = driver.step()
        slots = [segment.slot for segment in plan.segments]
        assert slots == list(range(slots[0], slots[0] + len(slots)))
        assert all(segment.task is not None for segment in plan.segments)
    driver.run()


def test_where_a_task_finds_room() -> None:
    """Beside its own adapter's tasks, on the side farther from the others. If it has none there: far from all."""
    assert distances([None] * 4) == [(0, 4)] * 4
    assert distances([True, None, None, False]) == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert distances([False, None, None, None]) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert distances([None, True, None, True, None, False]) == [(1, 5), (0, 4), (0, 3), (0, 2), (1, 1), (2, 0)]


# Answers


@pytest.fixture
def loras(tmp_path: Path) -> dict[str, Path]:
    return {name: tiny_lora(tmp_path / f"{name}.gguf", seed=seed) for name, seed in (("legal", 7), ("tax", 8))}


def settings(tiny: Path, **fields: Any) -> ModelSettings:
    return ModelSettings(path=tiny, name="m", context=256, slots=8, threads=1, **fields)


def engine_of(tiny: Path, **fields: Any) -> contextlib.closing[LlamaEngine]:
    engine = load_engine(settings(tiny, **fields))
    assert isinstance(engine, LlamaEngine)
    return contextlib.closing(engine)


@pytest.fixture
def engine(tiny: Path, loras: dict[str, Path]) -> Iterator[LlamaEngine]:
    with engine_of(tiny, adapters=loras) as engine:
        yield engine


async def test_each_answers_beside_the_others_as_alone(engine: LlamaEngine) -> None:
    """Three rounds of twelve tasks, of the base and both adapters, some from the cache."""
    engines = [engine, *engine.adapted]
    prompts = ["The sea is wide, and the sky is", "The harbour master wrote into his book"]
    alone = {(i, text): (await made(one, text, 20, sampling=GREEDY)).ids for i, one in enumerate(engines) for text in prompts}
    assert len({tuple(ids) for ids in alone.values()}) == len(alone), "each model has answers of its own"
    for round_ in range(3):
        tasks = [
            (i, text, make_task(one, text, 20, sampling=GREEDY, cache_scope=scope))
            for i, one in enumerate(engines)
            for text in prompts
            for scope in (None, b"scope")
        ]
        results = await asyncio.gather(*(run(engines[i], task) for i, _, task in tasks))
        for (i, text, task), result in zip(tasks, results, strict=True):
            assert result.ids == alone[i, text], (round_, i, text, task.cache_scope)
    assert any(result.finish.cached_tokens for result in results)


async def test_each_is_a_model_of_the_api(engine: LlamaEngine, tiny: Path, loras: dict[str, Path]) -> None:
    app = create_app([engine, *engine.adapted])
    listed = (await post(app, "/v1/models", b"", method="GET")).json()["data"]
    assert [model["id"] for model in listed] == ["m", "m:legal", "m:tax"]
    base, digests, texts = find(tiny).digest, [], set()
    for name in ("m", "m:legal", "m:tax"):
        call = Call("r", usage=Usage())
        body = {"model": name, "prompt": "The sea is wide", "max_tokens": 12, "temperature": 0}
        texts.add((await post(app, TEXT, body, call=call)).json()["choices"][0]["text"])
        digests.append(call.usage.model_digest)
    assert len(texts) == 3
    ours = hashlib.sha256(f"{base}\n{find(loras['legal']).digest}\n".encode()).hexdigest()
    assert digests == [base, "sha256:" + ours, adapted_digest(base, find(loras["tax"]).digest)]
    with pytest.raises(TaskRefused):
        engine.submit(make_task(engine, adapter="other"))


async def test_a_sealed_adapter_is_the_plain_one(tiny: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    sealed, kms = tmp_path / "legal.sealed", f"file:{tmp_path / 'kms'}"
    seal_model(loras["legal"], sealed, kms, lambda _what, _share: None)
    answers = []
    for path in (loras["legal"], sealed):
        engine = load_engine(settings(tiny, adapters={"legal": path}), kms)
        assert isinstance(engine, LlamaEngine)
        with contextlib.closing(engine):
            (adapted,) = engine.adapted
            answers.append((adapted.model.digest, (await made(adapted, max_tokens=12, sampling=GREEDY)).ids))
    assert answers[0] == answers[1]
    with pytest.raises(SettingsError, match="not sealed"):
        load_engine(settings(sealed, sealed=True, adapters=loras), kms)


def test_the_manifest_names_what_receipts_name(tiny: Path, loras: dict[str, Path]) -> None:
    engine = load_engine(settings(tiny, adapters=loras))
    assert isinstance(engine, LlamaEngine)
    with contextlib.closing(engine):
        engines = {each.model.name: (each.model.digest,) for each in (engine, *engine.adapted)}
    found = served_files(WorkerSettings.model_construct(models=(settings(tiny, adapters=loras),), kms="plain:"))
    assert {name: entry.digests for name, entry in found.items()} == engines
    assert len(found) == 3


# Serving


def worker(tmp_path: Path, *models: dict[str, Any], slots: int | None = None) -> WorkerSettings:
    usual = {"pool": "p", "node": "n", "trust": "A" * 43, "keys": "keys", "receipt_key": "k"}
    nats = {"url": "nats://127.0.0.1:4222", "credentials": "c"}
    return WorkerSettings.model_validate(usual | {"nats": nats, "models": models, "slots": slots}, context={"folder": tmp_path})


def test_a_worker_announces_each_and_they_share_the_slots(tiny: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    table = {"path": tiny, "context": 256, "slots": 4, "threads": 1}
    two = worker(tmp_path, table | {"name": "m", "adapters": loras}, table | {"name": "n"})
    with ExitStack() as stack:
        serving = served(two, stack)
        assert serving.names == ["m", "n", "m:legal", "m:tax"]
        assert (serving.slots, serving.each) == (8, {"m": 4, "n": 4})
        assert serving.sharing == {"m:legal": "m", "m:tax": "m"}
    clash = worker(tmp_path, table | {"name": "m", "adapters": loras}, table | {"name": "m:tax"})
    with ExitStack() as stack, pytest.raises(SettingsError, match="share the id m:tax"):
        served(clash, stack)


def test_the_workers_own_check_sees_a_bad_adapter(tiny: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    found: list[Reason] = []
    _held(worker(tmp_path, {"path": tiny, "adapters": loras}), found)
    assert [reason.kind for reason in found] == ["keys"], "the models are fine, and there are no keys here"
    found.clear()
    _held(worker(tmp_path, {"path": tiny, "adapters": {"bad": tiny}}), found)
    assert [reason.kind for reason in found] == ["model", "keys"]
    assert "not a LoRA adapter" in found[0].detail


# What is refused

Q = "blk.0.attn_q.weight.lora_"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.type": "model"}}, "not a LoRA adapter"),
        ({"metadata": {"general.type": 3}}, "not a LoRA adapter"),
        ({"metadata": {"adapter.type": "ia3"}}, "not a LoRA adapter"),
        ({"metadata": {"general.architecture": "qwen2"}}, "for the architecture qwen2, and tiny.gguf is llama"),
        ({"metadata": {"adapter.lora.alpha": 4}}, "no finite 32-bit number"),
        ({"metadata": {"adapter.lora.alpha": float("nan")}}, "no finite 32-bit number"),
        ({"metadata": {"adapter.alora.invocation_tokens": [1, 2]}}, "an activated LoRA"),
        ({"tensors": {Q + "b": np.zeros(0)}}, "does not fit the base model's shape"),
        ({"tensors": {Q + "a": np.zeros((4, 65))}}, "does not fit the base model's shape"),
        ({"tensors": {Q + "b": np.zeros((64, 5))}}, "does not fit the base model's shape"),
        ({"tensors": {Q + "a": np.zeros((2, 4, 64))}}, "does not fit the base model's shape"),
        ({"tensors": {"blk.9.attn_q.weight.lora_a": np.zeros((4, 64))}}, "no tensor blk.9.attn_q.weight"),
        ({"tensors": {"blk.0.attn_norm.weight": np.zeros(64)}}, "cannot apply its tensor blk.0.attn_norm.weight"),
    ],
)
def test_a_file_that_is_no_adapter_of_this_model(tiny: Path, tmp_path: Path, changes: Any, message: str) -> None:
    path = tiny_lora(tmp_path / "bad.gguf", **changes)
    with pytest.raises(SettingsError, match=message) as caught:
        load_engine(settings(tiny, adapters={"bad": path}))
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off(tiny: Path, loras: dict[str, Path]) -> None:
    data = loras["legal"].read_bytes()
    for size in (100, len(data) - 100):
        loras["legal"].write_bytes(data[:size])
        with pytest.raises(SettingsError, match=r"legal\.gguf cannot be used"):
            load_engine(settings(tiny, adapters=loras))


def test_a_model_as_adapter_and_an_adapter_of_an_embedder(tiny: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not a LoRA adapter"):
        load_engine(settings(tiny, adapters={"bad": tiny}))
    embeds = tiny_model(tmp_path / "embeds.gguf", embeds=True)
    with pytest.raises(SettingsError, match="remove `adapters`"):
        load_engine(ModelSettings(path=embeds, adapters=loras))
