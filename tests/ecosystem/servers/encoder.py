"""KServe with a small encoder under ONNX Runtime: `python encoder.py PORT`. It prints the names of the headers that it gets.

The encoder is the mean of fixed random vectors, one for each token, to length 1: little, and all of it really computed.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from onnx import TensorProto, helper, numpy_helper

TOKENS, LENGTH = 256, 16


def graph() -> bytes:
    table = np.random.default_rng(7).standard_normal((TOKENS, LENGTH), dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["vectors"]),
        helper.make_node("ReduceMean", ["vectors", "axis"], ["mean"], keepdims=0),
        helper.make_node("LpNormalization", ["mean"], ["embedding"], axis=1, p=2),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", LENGTH])
    fixed = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")]
    made = helper.make_graph(nodes, "encoder", [ids], [embedding], fixed)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


class Encoder(Model):  # type: ignore[misc]
    def load(self) -> bool:
        self.session = onnxruntime.InferenceSession(graph(), providers=["CPUExecutionProvider"])
        self.ready = True
        return True

    def predict(self, payload, headers=None, response_headers=None):  # type: ignore[no-untyped-def]
        print("headers:", *sorted(headers or ()), flush=True)
        if not isinstance(payload, InferRequest):  # V1, which is TensorFlow Serving's
            return {"predictions": self.encode(np.array(payload["instances"])).tolist()}
        embedding = self.encode(payload.inputs[0].as_numpy())
        output = InferOutput("embedding", list(embedding.shape), "FP32")
        output.set_data_from_numpy(embedding, binary_data=False)
        return InferResponse(payload.id, self.name, [output])

    def encode(self, ids):  # type: ignore[no-untyped-def]
        return self.session.run(None, {"ids": ids.astype(np.int64)})[0]


if __name__ == "__main__":
    encoder = Encoder("encoder")
    encoder.load()
    ModelServer(http_port=int(sys.argv[1]), enable_grpc=False).start([encoder])
