"""KServe with an ONNX graph under ONNX Runtime: `python server.py PORT GRAPH`. Tensors have the names that the graph has."""

from __future__ import annotations

import sys

import onnxruntime
from kserve import InferOutput, InferResponse, Model, ModelServer


class Graph(Model):  # type: ignore[misc]
    def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
        self.ready = True
        return True

    def predict(self, payload, headers=None, response_headers=None):  # type: ignore[no-untyped-def]
        [states] = self.session.run(None, {tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        output = InferOutput(self.session.get_outputs()[0].name, list(states.shape), "FP32")
        output.set_data_from_numpy(states, binary_data=False)
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    graph = Graph("xlnet")
    graph.load()
    ModelServer(http_port=int(sys.argv[1]), enable_grpc=False).start([graph])
