"""KServe by both of its protocols, asked sealed, with an encoder that TensorFlow wrote and OpenVINO reads.

TensorFlow Serving's own server is in no package here. KServe's V1 is its REST protocol.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import lacre
from backend.test_embeddings import TEXTS, task
from heavy.kserve.conftest import HERE, WRITTEN, Place
from lacre.evidence.receipts import units
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.protocol import Embedding
from lacre_backend.engine.sizing import LlamaSettings
from parts.minilm import NAME, Array, minilm, published
from parts.platforms import SCOPE, asked_in_secret, caller, canary
from parts.stage import until

ROOT: Final = Path(__file__).resolve().parents[3]
PREDICT, INFER = "/v1/models/encoder:predict", "/v2/models/minilm/infer"
# A cosine of less is another model: 32-bit floats, computed in another order, keep six digits.
COSINE: Final = 0.999
V1: Final = {"lacre-model": "encoder"}
V2: Final = {"lacre-model": "minilm"}


@pytest.fixture
async def client(place: Place) -> AsyncIterator[lacre.AsyncClient]:
    async with caller(place.live) as client:
        yield client


@pytest.fixture(scope="module")
def embedder() -> Iterator[LlamaEmbedder]:
    with closing(LlamaEmbedder(minilm(), name=NAME, digest="sha256:0", settings=LlamaSettings(threads=1))) as engine:
        yield engine


async def ours(embedder: LlamaEmbedder, texts: Sequence[str]) -> Array:
    """By our own engine, from the GGUF file."""
    found = []
    for text in texts:
        events = [event async for event in embedder.submit(task(embedder, text))]
        assert isinstance(events[0], Embedding)
        found.append(events[0].values)
    return np.array(found)


async def same(theirs: object, embedder: LlamaEmbedder, texts: Sequence[str]) -> None:
    vectors, own = np.array(theirs, np.float32), await ours(embedder, texts)
    assert vectors.shape == own.shape == (len(texts), 384)
    cosines = vectors @ own.T
    assert np.diag(cosines).min() > COSINE
    assert (cosines - np.eye(len(texts))).max() < COSINE, "texts are told apart"


def asked(word: str) -> list[str]:
    # A tokenizer of its own reads "[SEP]" in a text as the token; here it is text.
    return [f"The ship is named {word}.", *(text for text in TEXTS if "[SEP]" not in text)]


def tensor(texts: Sequence[str]) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}]}


async def test_by_v1_it_answers_what_our_engine_computes(
    place: Place, client: lacre.AsyncClient, embedder: LlamaEmbedder
) -> None:
    texts = asked(word := canary())
    body = {"instances": texts}
    response = await asked_in_secret(place.live, word, lambda: client.post(PREDICT, json=body, headers=V1))
    await same(response.json()["predictions"], embedder, texts)


async def test_by_v2_it_answers_what_our_engine_computes(
    place: Place, client: lacre.AsyncClient, embedder: LlamaEmbedder
) -> None:
    texts = asked(word := canary())
    body = {"id": "7", **tensor(texts)}
    response = await asked_in_secret(place.live, word, lambda: client.post(INFER, json=body, headers=V2), worker=1)
    [output] = response.json()["outputs"]
    assert (response.json()["id"], output["shape"]) == ("7", [len(texts), 384])
    await same(np.array(output["data"]).reshape(output["shape"]), embedder, texts)


async def test_openvino_reads_what_tensorflow_wrote(place: Place, client: lacre.AsyncClient) -> None:
    response = await client.post(PREDICT, json={"instances": [WRITTEN]}, headers=V1)
    [vector] = response.json()["predictions"]
    assert np.abs(np.array(vector) - place.saved.vector).max() < 1e-5
    assert np.abs(published().embed(published().ids(WRITTEN)) - place.saved.vector).max() < 1e-5


@pytest.mark.parametrize("protocol", ["v1", "v2"])
async def test_kserve_s_own_client_over_a_sealed_transport(
    place: Place, python: str, embedder: LlamaEmbedder, tmp_path: Path, protocol: str
) -> None:
    """By V2 its texts and vectors are binary, in a body with a header for the length of the JSON in it."""
    texts = ["A kitten on a rug", "naïve café — 東京"]
    own = {"PYTHONPATH": str(ROOT / "sdk"), "XDG_STATE_HOME": str(tmp_path)}
    access = {"LACRE_URL": place.live.gateways[0].url, "LACRE_TOKEN": place.live.token("mallory", scopes=[SCOPE])}
    command = [python, "-P", HERE / "by_kserve.py", protocol, *texts]
    done = await asyncio.to_thread(
        subprocess.run, command, check=False, capture_output=True, text=True, env={**os.environ, **own, **access}
    )
    assert done.returncode == 0, done.stderr
    await same(json.loads(done.stdout.splitlines()[-1]), embedder, texts)


async def test_usage_is_counted_in_units_of_bytes(client: lacre.AsyncClient) -> None:
    body = json.dumps(tensor(["a cat", "a dog"])).encode()
    response = await client.post(INFER, content=body, headers={**V2, "content-type": "application/json"})
    receipt = response.extensions["lacre"].receipt
    assert (receipt.prompt_tokens, receipt.completion_tokens) == (units(len(body)), units(len(response.content)))


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/v2/repository/models/minilm/unload", V2), ("/v2/models/encoder/infer", V2), (INFER, V1), (PREDICT, V2)],
)
async def test_other_paths_and_other_models_stay_out_of_reach(
    client: lacre.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    response = await client.post(path, json={}, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


async def test_an_error_of_the_server_is_passed_on(client: lacre.AsyncClient) -> None:
    response = await client.post(PREDICT, json={"wrong": []}, headers=V1)
    assert (response.status_code, response.json()) == (500, {"error": "KeyError : 'instances'"})


async def test_one_server_goes_and_the_other_answers(place: Place, client: lacre.AsyncClient) -> None:
    """The last one: a server less is there after it."""
    asked = [{"id": "7", **tensor(["a cat"])}] * 4
    both = [await client.post(INFER, json=body, headers=V2) for body in asked]
    place.servers[1].process.kill()
    await asyncio.to_thread(place.servers[1].process.wait, 10)
    left = [await client.post(INFER, json=body, headers=V2) for body in asked]
    assert {response.status_code for response in (*both, *left)} == {200}
    assert {response.content for response in (*both, *left)} == {both[0].content}
    log = place.live.workers[1].log
    await until(lambda: "upstream.down" in log.read_text())
