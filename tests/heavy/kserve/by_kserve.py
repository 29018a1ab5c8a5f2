"""KServe's own client over a sealed transport: `python by_kserve.py v1|v2 TEXT...`. Prints the vectors as JSON.

Its connection is that of `LACRE_URL`, with the token in `LACRE_TOKEN`.
"""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

import lacre
from lacre.legacy import AsyncTransport


async def main(protocol: str, texts: list[str]) -> None:
    async with lacre.AsyncClient() as sealed:
        client = InferenceRESTClient(RESTConfig(transport=AsyncTransport(sealed), protocol=protocol))
        print(json.dumps(await vectors(client, str(sealed.base_url), protocol, texts)))


async def vectors(client: InferenceRESTClient, url: str, protocol: str, texts: list[str]) -> list[list[float]]:
    if protocol == "v1":
        told = await client.infer(url, {"instances": texts}, "encoder", headers={"lacre-model": "encoder"})
        return told["predictions"]
    text = InferInput("text", [len(texts)], "BYTES")
    text.set_data_from_numpy(np.array([each.encode() for each in texts], object))  # binary, which is its default
    asked = InferRequest("minilm", [text], parameters={"binary_data_output": True})
    told = await client.infer(url, asked, "minilm", headers={"lacre-model": "minilm"})
    return told.outputs[0].as_numpy().tolist()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
