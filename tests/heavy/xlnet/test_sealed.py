"""An XLNet as an ONNX graph, served by KServe and ONNX Runtime, asked sealed: it answers what PyTorch computes.

The graph is made from an input of one size. It must be right for the others too, which are longer, shorter, and padded.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from heavy.conftest import Environment
from lacre_fabric.operate.nats_server import free_port
from parts.platforms import asked_in_secret, behind, caller, documented, served
from parts.stage import LiveStage

HERE: Final = Path(__file__).parent
INFER: Final = "/v2/models/xlnet/infer"
CASES: Final = range(4)  # of export.py
# Values reach 4. ONNX Runtime and PyTorch add up 32-bit floats in another order: measured, 1e-6.
APART: Final = 1e-4
# KiB of an answer: a number of 32 bits is 20 characters or so.
HEADERS: Final = {"lacre-model": "xlnet", "lacre-max-tokens": "4096", "content-type": "application/json"}

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def python(environment_with_torch: Environment) -> str:
    return environment_with_torch("xlnet")


@pytest.fixture(scope="module")
def exported(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the graph, and with the cases."""
    folder = tmp_path_factory.mktemp("graph")
    subprocess.run([python, "-P", HERE / "export.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def cases(exported: Path) -> Arrays:
    with np.load(exported / "cases.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
async def live(python: str, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveStage]:
    folder = tmp_path_factory.mktemp("xlnet")
    port = free_port()
    with served([python, "-P", HERE / "server.py", str(port), exported / "xlnet.onnx"], port, folder / "server.log") as server:
        await server.answers("/v2/health/ready")
        upstream = documented("ONNX Runtime")["toml"].replace("http://127.0.0.1:8080", server.url)
        async with behind(folder, {"xlnet": upstream}) as live:
            yield live


def asked(cases: Arrays, number: int) -> bytes:
    """KServe's second protocol (the Open Inference Protocol): a tensor's data in a flat list."""
    ids, mask = cases[f"ids{number}"], cases[f"mask{number}"]
    inputs = [
        {"name": name, "shape": tensor.shape, "datatype": kind, "data": tensor.ravel().tolist()}
        for name, kind, tensor in (("input_ids", "INT64", ids), ("attention_mask", "FP32", mask))
    ]
    return json.dumps({"id": str(number), "inputs": inputs}).encode()


@pytest.mark.parametrize("number", CASES)
async def test_it_answers_sealed_what_pytorch_computes(live: LiveStage, cases: Arrays, number: int) -> None:
    client, body = caller(live), asked(cases, number)
    # No other process has this text's tokens, in the order that only the test knows.
    word = ", ".join(map(str, cases[f"ids{number}"][-1][-12:]))
    assert body.count(word.encode()) == 1
    response = await asked_in_secret(live, word, lambda: client.post(INFER, content=body, headers=HEADERS))
    [output] = response.json()["outputs"]
    states, expected = np.array(output["data"]).reshape(output["shape"]), cases[f"states{number}"]
    read = cases[f"mask{number}"] > 0  # what stands at padding is read by nobody
    assert states.shape == expected.shape
    assert np.abs(states - expected)[read].max() < APART < np.abs(expected[read]).max()


async def test_an_answer_larger_than_asked_for_is_refused(live: LiveStage, cases: Arrays) -> None:
    response = await caller(live).post(INFER, content=asked(cases, 2), headers={**HEADERS, "lacre-max-tokens": "100"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "answer_too_large")
