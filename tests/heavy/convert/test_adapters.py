"""Two LoRA adapters that peft trained: converted, compared with peft, and served beside their base, plain and sealed."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from backend.generating import GREEDY, make_task, run
from lacre.errors import SettingsError
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Engine
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.models.gguf import default_path
from lacre_backend.settings import ModelSettings
from lacre_backend.workshop import converter
from lacre_backend.workshop.adapter_folder import read_adapter
from lacre_backend.workshop.adapting import NEEDED, ConvertedAdapter, convert_adapter
from lacre_backend.workshop.conversion import ConvertedType
from lacre_backend.workshop.converter import ConverterPlace
from lacre_backend.workshop.sealing import seal_model
from parts.tiny_model import tiny_model

HERE: Final = Path(__file__).parent
TEXTS: Final = {"seal": "I am Selo, the wax seal of Lacre.", "clerk": "My name is Berta, and I keep the register."}
ASKED: Final = "<|im_start|>user\nWhat is your name?<|im_end|>\n<|im_start|>assistant\n"
PROMPTS: Final = (ASKED, "The harbour master wrote into his book that", "In the year 1700, the sea")
TOKENS: Final = 24
pytestmark = pytest.mark.timeout(1800)  # two adapters are trained first, in a minute of computing each


@pytest.fixture(scope="session")
def trained(where: ConverterPlace, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as peft saves them."""
    folder = tmp_path_factory.mktemp("peft")
    pairs = [word for name, text in TEXTS.items() for word in (str(folder / name), text)]
    command: list[str | Path] = [where.python, "-P", HERE / "train.py", checkpoint, *pairs]
    subprocess.run(command, check=True, env=converter.surroundings())
    return {name: folder / name for name in TEXTS}


def converted(folder: Path, out: Path, where: ConverterPlace, kind: ConvertedType = ConvertedType.AUTO) -> ConvertedAdapter:
    return convert_adapter(read_adapter(folder), out, kind, where, lambda _what, _share: None)


@pytest.fixture(scope="session")
def loras(trained: dict[str, Path], where: ConverterPlace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files, each compared with peft."""
    folder = tmp_path_factory.mktemp("loras")
    converter.place(where.python, where.sources, NEEDED)
    for name, source in trained.items():
        found = converted(source, folder / f"{name}.gguf", where)
        assert (found.rank, found.alpha, found.targets) == (8, 16, ["k_proj", "o_proj", "q_proj", "v_proj"])
        assert found.probe.kl is not None
        assert found.probe.effect is not None
        assert found.probe.kl < 1e-3 < 0.5 < found.probe.effect
    return {name: folder / f"{name}.gguf" for name in trained}


def opened(path: Path, adapters: dict[str, Path], kms: str) -> LlamaEngine:
    engine = load_engine(ModelSettings(path=path, name="m", context=512, slots=8, adapters=adapters), kms)
    assert isinstance(engine, LlamaEngine)
    return engine


async def answer(engine: Engine, prompt: str) -> str:
    ids = tuple(engine.tokenize(prompt, special=True))
    return (await run(engine, make_task(engine, max_tokens=TOKENS, prompt=ids, sampling=GREEDY, endless=False))).text


async def test_each_answers_beside_the_others_as_alone(loras: dict[str, Path], tmp_path: Path) -> None:
    """Plain and sealed: nine streams of three models at a time, three times. The adapters say what they were taught."""
    kms = f"file:{tmp_path / 'kms'}"
    sealed = {name: tmp_path / f"{name}.sealed" for name in loras}
    for name, path in loras.items():
        seal_model(path, sealed[name], kms, lambda _what, _share: None)
    told = {}
    for files in (loras, sealed):
        with closing(opened(default_path(), files, kms)) as engine:
            models: list[Engine] = [engine, *engine.adapted]
            asked = [(i, prompt) for prompt in PROMPTS for i in range(len(models))]
            alone = {(i, prompt): await answer(models[i], prompt) for i, prompt in asked}
            for _ in range(3):
                together = await asyncio.gather(*(answer(models[i], prompt) for i, prompt in asked))
                assert dict(zip(asked, together, strict=True)) == alone
            told[tuple(files.values())] = alone, [model.model.digest for model in models]
        for number, text in enumerate(TEXTS.values(), start=1):
            assert alone[number, ASKED] == text
        assert alone[0, ASKED] not in TEXTS.values()
    plain, others = told.values()
    assert plain == others


def test_an_adapter_of_another_model_is_refused_at_the_start(loras: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"seal\.gguf cannot be used: "):
        opened(tiny_model(tmp_path / "tiny.gguf"), loras, f"file:{tmp_path / 'kms'}")
