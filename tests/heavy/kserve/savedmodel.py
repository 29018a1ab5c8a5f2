"""Writes a BERT encoder as a SavedModel, with TensorFlow: `python savedmodel.py FOLDER`.

FOLDER has `weights.npz`, named as published, `config.json`, and `ids.json`: a list of token ids. The SavedModel goes into
`FOLDER/encoder/1`, as TensorFlow Serving wants it. TensorFlow's own vector for the ids goes into `FOLDER/vector.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

EACH = tf.TensorSpec([None, None], tf.int32)  # a row for each text; any number, of any length


class Encoder(tf.Module):  # type: ignore[misc]
    def __init__(self, weights, config):  # type: ignore[no-untyped-def]
        super().__init__()
        self.weights = {name.replace(".", "/"): tf.Variable(value, name=name) for name, value in weights.items()}
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.eps = config["layer_norm_eps"]

    @tf.function(input_signature=[EACH, EACH])  # type: ignore[untyped-decorator]
    def encode(self, ids, mask):  # type: ignore[no-untyped-def]
        """mask: 1 for each token of the text, 0 for what fills up its row."""
        table = self.weights["embeddings/position_embeddings/weight"]
        words = tf.gather(self.weights["embeddings/word_embeddings/weight"], ids)
        x = words + table[: tf.shape(ids)[1]] + self.weights["embeddings/token_type_embeddings/weight"][0]
        x = self.norm(x, "embeddings/LayerNorm")
        own = tf.cast(mask, tf.float32)
        hidden = (1 - own)[:, tf.newaxis, tf.newaxis, :] * -1e9
        for layer in range(self.layers):
            here = f"encoder/layer/{layer}"
            x = self.norm(x + self.attention(x, hidden, f"{here}/attention"), f"{here}/attention/output/LayerNorm")
            wide = tf.nn.gelu(self.linear(x, f"{here}/intermediate/dense"), approximate=False)
            x = self.norm(x + self.linear(wide, f"{here}/output/dense"), f"{here}/output/LayerNorm")
        mean = tf.reduce_sum(x * own[:, :, tf.newaxis], 1) / tf.reduce_sum(own, 1, keepdims=True)
        return {"embedding": tf.math.l2_normalize(mean, -1)}

    def attention(self, x, hidden, here):  # type: ignore[no-untyped-def]
        shape = tf.shape(x)

        def split(name):  # type: ignore[no-untyped-def]
            rows = tf.reshape(self.linear(x, f"{here}/self/{name}"), [shape[0], shape[1], self.heads, -1])
            return tf.transpose(rows, [0, 2, 1, 3])

        q, k, v = split("query"), split("key"), split("value")
        scores = tf.matmul(q, k, transpose_b=True) / tf.sqrt(tf.cast(tf.shape(q)[-1], tf.float32))
        joined = tf.transpose(tf.matmul(tf.nn.softmax(scores + hidden), v), [0, 2, 1, 3])
        return self.linear(tf.reshape(joined, shape), f"{here}/output/dense")

    def linear(self, x, name):  # type: ignore[no-untyped-def]
        return tf.matmul(x, self.weights[f"{name}/weight"], transpose_b=True) + self.weights[f"{name}/bias"]

    def norm(self, x, name):  # type: ignore[no-untyped-def]
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        return (x - mean) / tf.sqrt(variance + self.eps) * self.weights[f"{name}/weight"] + self.weights[f"{name}/bias"]


def main(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    encoder = Encoder(np.load(folder / "weights.npz"), config)
    tf.saved_model.save(encoder, str(folder / "encoder/1"), signatures={"serving_default": encoder.encode})
    ids = tf.constant([json.loads((folder / "ids.json").read_text())])
    vector = encoder.encode(ids, tf.ones_like(ids))["embedding"].numpy()[0]
    (folder / "vector.json").write_text(json.dumps(vector.tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
