"""A GGUF model of two layers and random weights, below 1 MB, so that an engine loads in milliseconds. It says nonsense.

Written by hand: the format is a header, metadata and tensors (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

_UINT16, _UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT32 = 2, 4, 6, 7, 8, 9, 5
_ALIGNMENT = 32
_F32 = 0
N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, N_FF = 64, 2, 4, 2, 128
D_CONV, D_INNER, D_STATE, DT_RANK = 4, 128, 16, 4  # of the recurrent one
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


# The character that stands for each byte in vocabularies with merges, as GPT-2 chose them: itself, or one from 256 on.
_ITSELF = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _ITSELF]
PRINTABLE = "".join(chr(byte if byte in _ITSELF else 256 + _OTHERS.index(byte)) for byte in range(256))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A typed value: int is uint32; a list takes its type from its first item, of which int is int32."""
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case np.uint16():
            return struct.pack("<IH", _UINT16, value)
        case np.int32():
            return struct.pack("<Ii", _INT32, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
    kind, pack = {
        str: (_STRING, _string),
        int: (_INT32, lambda item: struct.pack("<i", item)),
        float: (_FLOAT32, lambda item: struct.pack("<f", item)),
    }[type(value[0])]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(pack(item) for item in value)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """Tensors are written as 32-bit floats, in numpy's order (llama.cpp names the last dimension first)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = bytearray()
    for name, tensor in tensors.items():
        data += b"\0" * (-len(data) % _ALIGNMENT)
        shape = tensor.shape[::-1]
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", _F32, len(data))
        data += np.ascontiguousarray(tensor, dtype=np.float32).tobytes()
    path.write_bytes(head + b"\0" * (-len(head) % _ALIGNMENT) + bytes(data))
    return path


def tiny_model(
    path: Path,
    *,
    n_ctx: int = 4096,
    seed: int = 1,
    vocabulary: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    template: str = TEMPLATE,
    embeds: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Tokens are the bytes of the text, unless `vocabulary` (of `tiny_vocabulary`) says otherwise. without: tokens left out.

    embeds: it makes one vector of a text, in place of more text. more: further metadata.
    """
    written = dict(vocabulary if vocabulary is not None else tiny_vocabulary("llama"))
    if without:
        columns = ("tokens", "scores", "token_type")
        kept = [i for i, token in enumerate(written["tokenizer.ggml.tokens"]) if token not in without]
        written |= {f"tokenizer.ggml.{name}": [written[f"tokenizer.ggml.{name}"][i] for i in kept] for name in columns}
    metadata = _metadata(written, n_ctx) | {"tokenizer.chat_template": template} | dict(more)
    if embeds:
        metadata["llama.pooling_type"] = 1  # the mean
    return write_gguf(path, metadata, _weights(len(written["tokenizer.ggml.tokens"]), seed))


def tiny_split_model(folder: Path, name: str = "tiny", *, count: int = 3) -> list[Path]:
    """The same in several files, as `llama-gguf-split` writes them."""
    vocabulary = tiny_vocabulary("llama")
    weights = list(_weights(len(vocabulary["tokenizer.ggml.tokens"]), 1).items())
    files = []
    for number in range(count):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(len(weights)),
        }
        metadata = _metadata(vocabulary, 4096) | {"tokenizer.chat_template": TEMPLATE} if number == 0 else {}
        path = folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
        files.append(write_gguf(path, metadata | split, dict(weights[number::count])))
    return files


def _metadata(vocabulary: Mapping[str, Any], n_ctx: int) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": N_LAYER,
        "llama.context_length": n_ctx,
        "llama.embedding_length": N_EMBD,
        "llama.feed_forward_length": N_FF,
        "llama.attention.head_count": N_HEAD,
        "llama.attention.head_count_kv": N_HEAD_KV,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": N_EMBD // N_HEAD,
        **vocabulary,
    }


def tiny_recurrent_model(path: Path, *, n_ctx: int = 4096, seed: int = 1) -> Path:
    """A Mamba of two layers: it keeps one state for each sequence, which cannot be cut."""
    vocabulary = tiny_vocabulary("llama")
    metadata = {
        "general.architecture": "mamba",
        "general.name": "tiny",
        "mamba.block_count": N_LAYER,
        "mamba.context_length": n_ctx,
        "mamba.embedding_length": N_EMBD,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
        "mamba.ssm.conv_kernel": D_CONV,
        "mamba.ssm.inner_size": D_INNER,
        "mamba.ssm.state_size": D_STATE,
        "mamba.ssm.time_step_rank": DT_RANK,
        **vocabulary,
        "tokenizer.chat_template": TEMPLATE,
    }
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return random.normal(0, shape[-1] ** -0.5, shape)

    n_vocab = len(vocabulary["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": random.normal(0, 1, (n_vocab, N_EMBD)), "output_norm.weight": np.ones(N_EMBD)}
    tensors["output.weight"] = 4 * matrix(n_vocab, N_EMBD)
    for layer in range(N_LAYER):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": np.ones(N_EMBD),
            f"blk.{layer}.ssm_in.weight": matrix(2 * D_INNER, N_EMBD),
            f"blk.{layer}.ssm_conv1d.weight": matrix(D_INNER, D_CONV),
            f"blk.{layer}.ssm_conv1d.bias": np.zeros(D_INNER),
            f"blk.{layer}.ssm_x.weight": matrix(DT_RANK + 2 * D_STATE, D_INNER),
            f"blk.{layer}.ssm_dt.weight": matrix(D_INNER, DT_RANK),
            f"blk.{layer}.ssm_dt.bias": np.zeros(D_INNER),
            f"blk.{layer}.ssm_a": -np.tile(np.arange(1.0, D_STATE + 1), (D_INNER, 1)),
            f"blk.{layer}.ssm_d": np.ones(D_INNER),
            f"blk.{layer}.ssm_out.weight": matrix(N_EMBD, D_INNER),
        }
    return write_gguf(path, metadata, tensors)


def tiny_vocabulary(model: str, pre: str | None = None) -> dict[str, Any]:
    """The smallest one of each kind that llama.cpp reads, with a token for each byte or each character of ASCII.

    model: `tokenizer.ggml.model`. pre: `tokenizer.ggml.pre`, for the models with merges.
    """
    marks, words = ["<unk>", "<s>", "</s>"], ["\u2581", "a", "aa", "!", "!!"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    byte_kinds = [BYTE] * 256
    merges: list[str] = []
    match model:
        case "llama":
            words = ["\u2581"]
        case "plamo2":
            pass
        case "bert":
            byte_tokens, byte_kinds = [], []  # none in this kind: what has no token is `<unk>`
            words = ["\u2581", *(chr(code) for code in range(0x21, 0x7F))]
        case "t5":
            words = ["\u2581", "\u2581a", "a", "!"]
        case "rwkv":
            byte_tokens, words = [f"\\x{byte:02x}" for byte in range(256)], ["aa", "!!"]
            byte_kinds = [NORMAL] * 256
        case "gemma4":
            merges, words = ["a a", "! !"], ["\u2581", "a", "aa", "!", "!!", "\n"]
        case _:  # with merges, and a printable character for each byte
            byte_tokens, words = list(PRINTABLE), ["aa", "!!"]
            byte_kinds = [NORMAL] * 256
            merges = ["a a", "! !"]
    tokens = [*marks, *byte_tokens, *words]
    vocabulary = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *byte_kinds, *([NORMAL] * len(words))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if model == "bert":
        vocabulary |= {"tokenizer.ggml.seperator_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    if merges:
        vocabulary["tokenizer.ggml.merges"] = merges
    if pre is not None:
        vocabulary["tokenizer.ggml.pre"] = pre
    return vocabulary


def _weights(n_vocab: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return random.normal(0, shape[-1] ** -0.5, shape)

    def ones() -> np.ndarray[Any, Any]:
        return np.ones(N_EMBD)

    kv = N_EMBD * N_HEAD_KV // N_HEAD
    tensors = {"token_embd.weight": random.normal(0, 1, (n_vocab, N_EMBD)), "output_norm.weight": ones()}
    tensors["output.weight"] = 4 * matrix(n_vocab, N_EMBD)
    shapes: Sequence[tuple[str, tuple[int, int]]] = (
        ("attn_q", (N_EMBD, N_EMBD)),
        ("attn_k", (kv, N_EMBD)),
        ("attn_v", (kv, N_EMBD)),
        ("attn_output", (N_EMBD, N_EMBD)),
        ("ffn_gate", (N_FF, N_EMBD)),
        ("ffn_up", (N_FF, N_EMBD)),
        ("ffn_down", (N_EMBD, N_FF)),
    )
    for layer in range(N_LAYER):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{norm}.weight"] = ones()
        for name, shape in shapes:
            tensors[f"blk.{layer}.{name}.weight"] = matrix(*shape)
    return tensors
