"""Real servers of models behind a worker, asked sealed: KServe by both of its protocols, and llama.cpp's own server.

What sees a request: the SDK that seals it, the worker that opens it, and the server behind that; and nobody between them.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

import lacre
from lacre.evidence.receipts import units
from lacre.runtime import private_files
from lacre_backend.models import gguf
from lacre_fabric.operate.nats_server import free_port
from parts.memory import found_in_memory
from parts.platforms import Served, asked_in_secret, behind, canary, served, table
from parts.stage import MODEL, LiveStage, until
from parts.stage.processes import OwnProcess
from parts.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ROOT / "tests/ecosystem/servers"
PREDICT, INFER = "/v1/models/encoder:predict", "/v2/models/encoder/infer"
CANARY = canary()
KEY = canary()
ENCODER = {"lacre-model": "encoder"}


@contextmanager
def running(folder: Path, program: str, *arguments: str) -> Iterator[Served]:
    made = [sys.executable, str(ROOT / "tools/environments.py"), "servers"]
    python = subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()
    port = free_port()
    with served([python, SERVERS / f"{program}.py", str(port), *arguments], port, folder / f"{program}.log") as server:
        yield server


@dataclass
class Place:
    """Everything that runs. key: the file with llama.cpp's key, from which the worker reads it."""

    workers: LiveStage
    encoder: Served
    writer: Served
    key: Path


@pytest.fixture(scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    folder = tmp_path_factory.mktemp("upstream")
    with ExitStack() as stack:
        encoder = stack.enter_context(running(folder, "encoder"))
        key = folder / "writer.key"
        private_files.replace(key, f"{KEY}\n".encode())
        writer = stack.enter_context(running(folder, "writer", str(gguf.find().path), str(key)))
        await encoder.answers("/v2/health/ready")
        await writer.answers("/health")
        upstreams = {
            "encoder": table(encoder.url, "encoder", [f"POST {PREDICT}", f"POST {INFER}", "GET /v2/models/encoder"]),
            MODEL: table(
                writer.url, MODEL, ["POST /v1/chat/completions", "POST /v1/completions"],
                'known_as = "whatever it was started with"\nfixed = {cache_prompt = false}',
                f'health = "/health"\ncredentials = [{{file = "{key}"}}]',
            ),
        }  # fmt: skip
        async with behind(folder, upstreams) as workers:
            yield Place(workers, encoder, writer, key)


@pytest.fixture
def client(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[lacre.Client]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with lacre.Client(
        place.workers.gateways[0].url, token=place.workers.token("mallory", scopes=["lacre:http"]), retries=0
    ) as client:
        yield client


def shown_by(process: OwnProcess) -> str:
    """Its log, its settings, its command line and its environment."""
    here = Path(f"/proc/{process.process.pid}")
    return "".join(path.read_text() for path in (process.log, process.settings, here / "cmdline", here / "environ"))


def told(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def length(embedding: list[float]) -> float:
    return math.sqrt(sum(each * each for each in embedding))


def nobody_on_the_way_has_read(place: Place) -> bool:
    """That the worker's memory is looked through in the same way, and has what was asked, is seen while llama.cpp streams."""
    processes = (place.workers.gateways[0].process, place.workers.nats)
    return not any(found_in_memory(process.pid, {"canary": CANARY.encode()}) for process in processes)


async def test_kserve_by_its_first_protocol(place: Place, client: lacre.Client) -> None:
    body = json.dumps({"instances": [[1, 2, 3], [4, 5, 6]], "note": CANARY}).encode()
    headers = {**ENCODER, "content-type": "application/json"}
    response = await asyncio.to_thread(client.post, PREDICT, content=body, headers=headers)
    assert response.status_code == 200, response.text
    one, other = response.json()["predictions"]
    assert len(one) == 16 and one != other
    assert length(one) == pytest.approx(1, abs=1e-5) and length(other) == pytest.approx(1, abs=1e-5)
    facts = response.extensions["lacre"]
    counted = (facts.receipt.prompt_tokens, facts.receipt.cached_tokens, facts.receipt.completion_tokens)
    assert counted == (units(len(body)), 0, units(len(response.content)))
    assert nobody_on_the_way_has_read(place)
    members = ("prompt_tokens", "cached_tokens", "completion_tokens")

    def settled() -> list[tuple[int, ...]]:
        return [tuple(outcome[member] for member in members) for outcome in place.workers.entries("outcome")]

    await until(lambda: counted in settled(), PATIENCE, settled)  # beside the request
    assert nobody_on_the_way_has_read(place)


async def test_kserve_by_its_second_protocol(place: Place, client: lacre.Client) -> None:
    tensor = {"name": "ids", "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 3]}
    asked = {"id": "7", "inputs": [tensor], "parameters": {"note": CANARY}}
    response = await asked_in_secret(
        place.workers, CANARY, lambda: asyncio.to_thread(client.post, INFER, json=asked, headers=ENCODER)
    )
    assert response.status_code == 200, response.text
    [output] = response.json()["outputs"]
    assert (output["name"], output["shape"]) == ("embedding", [1, 16]) and length(output["data"]) == pytest.approx(1, abs=1e-5)
    first = await asyncio.to_thread(client.post, PREDICT, json={"instances": [[1, 2, 3]]}, headers=ENCODER)
    assert first.json()["predictions"][0] == pytest.approx(output["data"], abs=1e-5)
    about = await asyncio.to_thread(client.get, "/v2/models/encoder", headers=ENCODER)
    assert about.json()["name"] == "encoder"


async def test_it_does_not_learn_who_asks(place: Place, client: lacre.Client) -> None:
    private = {"authorization": "Bearer inside", "cookie": "id=7", "user-agent": "theirs", "x-forwarded-for": "192.0.2.7"}
    assert (
        await asyncio.to_thread(client.post, PREDICT, json={"instances": [[1]]}, headers=private | ENCODER)
    ).status_code == 200
    log = place.encoder.log.read_text()
    headers = [line.split()[1:] for line in log.splitlines() if line.startswith("headers:")]
    assert headers and set(headers[-1]) == {"accept", "accept-encoding", "content-length", "content-type", "host"}
    assert "mallory" not in log


@pytest.mark.parametrize(
    ("method", "path", "refusal"),
    [
        ("POST", "/v2/models/other/infer", (404, "unknown_url")),
        ("POST", "/v2/repository/models/encoder/unload", (404, "unknown_url")),
        ("DELETE", INFER, (405, "method_not_supported")),
    ],
)
async def test_what_was_not_allowed_is_not_asked(
    client: lacre.Client, method: str, path: str, refusal: tuple[int, str]
) -> None:
    response = await asyncio.to_thread(client.request, method, path, headers=ENCODER)
    assert told(response) == refusal


async def test_an_application_needs_its_scope(place: Place, client: lacre.Client) -> None:
    with lacre.Client(place.workers.gateways[0].url, token=place.workers.token("mallory"), retries=0) as plain:
        response = await asyncio.to_thread(plain.post, PREDICT, json={"instances": [[1]]}, headers=ENCODER)
    assert told(response) == (404, "unknown-path")


async def test_an_answer_has_the_room_that_was_asked_for(client: lacre.Client) -> None:
    body = {"instances": [[number % 256] for number in range(40)]}
    headers = {**ENCODER, "lacre-max-tokens": "2"}
    response = await asyncio.to_thread(client.post, PREDICT, json=body, headers=headers)
    assert told(response) == (413, "answer_too_large")
    response = await asyncio.to_thread(client.post, PREDICT, json=body, headers={**headers, "lacre-max-tokens": "40"})
    assert len(response.json()["predictions"]) == 40


async def test_llama_cpp_s_server_streams(place: Place, client: lacre.Client) -> None:
    """Record by record, while it writes; and no one between client and worker can read what was asked."""
    arrived: list[float] = []
    seen: dict[str, bool] = {}
    watched = {
        "gateway": place.workers.gateways[0].process,
        "nats": place.workers.nats,
        "workers": place.workers.workers[1].process,
        "server": place.writer.process,
    }

    def read() -> lacre.ChatStream:
        stream = client.chat_stream(f"Tell a long story about a ship that is named {CANARY}.", model=MODEL, max_tokens=120)
        for _ in stream:
            arrived.append(time.monotonic())
            if len(arrived) == 3:
                for name, process in watched.items():
                    seen[name] = bool(found_in_memory(process.pid, {"canary": CANARY.encode()}))
        return stream

    stream = await asyncio.to_thread(read)
    assert len(arrived) > 60 and arrived[-1] - arrived[0] > 0.2
    assert seen == {"gateway": False, "nats": False, "workers": True, "server": True}
    assert not found_in_memory(watched["gateway"].pid, {"canary": CANARY.encode()})
    assert stream.receipt is not None
    assert stream.usage.completion == stream.receipt.completion_tokens <= 120
    assert stream.usage.prompt > 20 and stream.usage.cached == 0
    assert stream.receipt.completion_tokens >= len(arrived)


async def test_its_ceiling_is_the_grant_s_and_its_file_s_place_its_own(client: lacre.Client) -> None:
    reply = await asyncio.to_thread(client.chat, "Count to a hundred.", model=MODEL, max_tokens=5)
    assert 1 <= reply.usage.completion <= 5 and reply.receipt is not None  # it may end by itself before
    assert reply.receipt.completion_tokens == reply.usage.completion
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 5}
    response = await asyncio.to_thread(client.post, "/v1/chat/completions", json=body)
    assert response.json()["model"] == MODEL and ".gguf" not in response.text
    refused = await asyncio.to_thread(client.post, "/v1/chat/completions", json={**body, "n_predict": 50})
    assert told(refused) == (400, "unknown_parameter")


async def test_the_worker_has_a_key_that_no_one_else_has(place: Place, client: lacre.Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 2}
    async with httpx2.AsyncClient(trust_env=False) as direct:
        refused = await direct.post(place.writer.url + "/v1/chat/completions", json=body)
    assert refused.status_code == 401
    theirs = {"authorization": "Bearer theirs"}

    async def asked() -> int:
        return (await asyncio.to_thread(client.post, "/v1/chat/completions", json=body, headers=theirs)).status_code

    async def tells(status: int) -> bool:
        return await asked() == status

    assert await asked() == 200
    private_files.replace(place.key, b"another")
    await until(lambda: tells(401))
    private_files.replace(place.key, KEY.encode())
    await until(lambda: tells(200))
    worker, gateway = place.workers.workers[1], place.workers.gateways[0]
    assert worker.log.read_text().count("upstream.credential_read") == 2
    for process in (worker, gateway):
        assert KEY not in shown_by(process)
    assert not found_in_memory(gateway.process.pid, {"key": KEY.encode()})
    assert found_in_memory(worker.process.pid, {"key": KEY.encode()})


async def test_a_server_that_has_died(place: Place, client: lacre.Client) -> None:
    place.encoder.process.kill()
    place.encoder.process.wait(10)
    response = await asyncio.to_thread(client.post, PREDICT, json={"instances": [[1]]}, headers=ENCODER)
    assert told(response) == (502, "upstream_unavailable")
    assert "127.0.0.1" not in response.text
