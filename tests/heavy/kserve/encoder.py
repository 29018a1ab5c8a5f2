"""KServe with a SavedModel that OpenVINO reads: `python encoder.py PORT SAVED_MODEL TOKENIZER NAME...`.

It answers by both of KServe's protocols, under each of the names. V1 is TensorFlow Serving's REST: an instance is a text.
"""

from __future__ import annotations

import sys

import numpy as np
import openvino
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from tokenizers import Tokenizer

# By default OpenVINO computes in bfloat16 on processors that can: that keeps three digits.
OPTIONS = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}


class Network:
    """The encoder. saved_model, tokenizer: paths."""

    def __init__(self, saved_model: str, tokenizer: str) -> None:
        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(saved_model), "CPU", OPTIONS)
        self.places = {port.get_any_name(): number for number, port in enumerate(self.compiled.inputs)}
        self.tokenizer = Tokenizer.from_file(tokenizer)
        self.tokenizer.enable_padding()
        self.tokenizer.no_truncation()

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = self.tokenizer.encode_batch(texts)
        inputs = {"ids": [row.ids for row in rows], "mask": [row.attention_mask for row in rows]}
        return self.compiled({self.places[name]: np.array(value, np.int32) for name, value in inputs.items()})[0]


class Encoder(Model):  # type: ignore[misc]
    def __init__(self, name: str, network: Network) -> None:
        super().__init__(name)
        self.network = network
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):  # type: ignore[no-untyped-def]
        if not isinstance(payload, InferRequest):
            return {"predictions": self.network.encode(payload["instances"]).tolist()}
        vectors = self.network.encode([text_of(each) for each in payload.inputs[0].as_numpy()])
        output = InferOutput("embedding", list(vectors.shape), "FP32")
        output.set_data_from_numpy(vectors, binary_data=bool(payload.use_binary_outputs))
        return InferResponse(payload.id, self.name, [output])


def text_of(value: bytes | str) -> str:
    """A string of V2: bytes if its tensor came as bytes."""
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    port, saved_model, tokenizer, *names = sys.argv[1:]
    network = Network(saved_model, tokenizer)
    ModelServer(http_port=int(port), enable_grpc=False).start([Encoder(name, network) for name in names])
