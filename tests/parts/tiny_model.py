"""A GGUF model of two layers and random weights, below 1 MB, so that an engine loads in milliseconds. It says nonsense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Kind

_KINDS = {
    bool: Kind.BOOL, np.uint16: Kind.UINT16, np.int32: Kind.INT32, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING,
}  # fmt: skip
N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, N_FF = 64, 2, 4, 2, 128
D_CONV, D_INNER, D_STATE, DT_RANK = 4, 128, 16, 4  # of the recurrent one
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
_MARKS = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


# The character that stands for each byte in vocabularies with merges, as GPT-2 chose them: itself, or one from 256 on.
_ITSELF = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _ITSELF]
PRINTABLE = "".join(chr(byte if byte in _ITSELF else 256 + _OTHERS.index(byte)) for byte in range(256))


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """An int is written as uint32, unless it is one of numpy's; those in lists as int32. Tensors are 32-bit floats."""
    members = dict(metadata)
    writer = gguf.GGUFWriter(path, members.pop("general.architecture", "llama"))
    for key, value in members.items():
        writer.add_key_value(key, value, _KINDS.get(type(value), Kind.ARRAY))
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
    says: str = "",
    tensors: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
) -> Path:
    """Tokens are the bytes of the text, unless `vocabulary` (of `tiny_vocabulary`) says otherwise. without: tokens left out.

    embeds: it makes one vector of a text, in place of more text. more: further metadata. says: its answer after `:` and `o`,
    of different letters. tensors: in place of its own.
    """
    written = dict(vocabulary if vocabulary is not None else tiny_vocabulary("llama"))
    if without:
        columns = ("tokens", "scores", "token_type")
        kept = [i for i, token in enumerate(written["tokenizer.ggml.tokens"]) if token not in without]
        written |= {f"tokenizer.ggml.{name}": [written[f"tokenizer.ggml.{name}"][i] for i in kept] for name in columns}
    metadata = _metadata(written, n_ctx) | {"tokenizer.chat_template": template} | dict(more)
    if embeds:
        metadata["llama.pooling_type"] = 1  # the mean
    weights = _weights(len(written["tokenizer.ggml.tokens"]), seed)
    return write_gguf(path, metadata, (_saying(weights, says) if says else weights) | dict(tensors))


def _saying(weights: dict[str, np.ndarray[Any, Any]], text: str) -> dict[str, np.ndarray[Any, Any]]:
    """Layers that change nothing, and an output that makes each letter the likeliest after the one before."""
    silent = {name: 0 * tensor for name, tensor in weights.items() if "attn_output." in name or "ffn_down" in name}
    embedding, output = weights["token_embd.weight"], 0 * weights["output.weight"]
    first, *rest = (len(_MARKS) + byte for byte in text.encode())
    output[first] = embedding[len(_MARKS) + ord(":")] + embedding[len(_MARKS) + ord("o")]
    for before, after in zip([first, *rest], [*rest, _MARKS.index("</s>")], strict=True):
        output[after] = embedding[before]
    return weights | silent | {"output.weight": output}


def tiny_reranker(path: Path, *, seed: int = 1, n_ctx: int = 256, template: str | None = None) -> Path:
    """A BERT of one layer that makes one number of a query and a document."""
    own = {
        "block_count": 1, "context_length": n_ctx, "embedding_length": N_EMBD, "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.layer_norm_epsilon": 1e-5, "attention.causal": False, "pooling_type": 4,
    }  # fmt: skip
    vocabulary = tiny_vocabulary("bert")
    metadata = _named("bert", own) | vocabulary | {"tokenizer.ggml.token_type_count": 1}
    if template is not None:
        metadata["tokenizer.chat_template.rerank"] = template
    both, matrix = _both_ends(len(vocabulary["tokenizer.ggml.tokens"]), seed)
    tensors = {"token_embd.weight": both["token_embd.weight"], "position_embd.weight": matrix(n_ctx, N_EMBD)}
    shapes = {
        "attn_q": (N_EMBD, N_EMBD), "attn_k": (N_EMBD, N_EMBD), "attn_v": (N_EMBD, N_EMBD), "attn_output": (N_EMBD, N_EMBD),
        "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF),
    }  # fmt: skip
    for name, (outer, inner) in shapes.items():
        tensors |= {f"blk.0.{name}.weight": matrix(outer, inner), f"blk.0.{name}.bias": np.zeros(outer)}
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        tensors |= {f"{norm}.weight": np.ones(N_EMBD), f"{norm}.bias": np.zeros(N_EMBD)}
    return write_gguf(path, metadata, tensors | {"cls.output.weight": matrix(1, N_EMBD), "cls.output.bias": np.zeros(1)})


def tiny_split_model(folder: Path, name: str = "tiny", *, count: int = 3) -> list[Path]:
    """The same in several files, as `llama-gguf-split` writes them."""
    vocabulary = tiny_vocabulary("llama")
    weights = list(_weights(len(vocabulary["tokenizer.ggml.tokens"]), 1).items())
    files = []
    for number in range(count):
        split = {"split.no": np.uint16(number), "split.count": np.uint16(count), "split.tensors.count": np.int32(len(weights))}
        metadata = _metadata(vocabulary, 4096) | {"tokenizer.chat_template": TEMPLATE} if number == 0 else {}
        path = folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
        files.append(write_gguf(path, metadata | split, dict(weights[number::count])))
    return files


def _metadata(vocabulary: Mapping[str, Any], n_ctx: int) -> dict[str, Any]:
    own = {
        "block_count": N_LAYER, "context_length": n_ctx, "embedding_length": N_EMBD, "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD_KV, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": N_EMBD // N_HEAD,
    }  # fmt: skip
    return _named("llama", own) | dict(vocabulary)


def _named(architecture: str, own: Mapping[str, Any]) -> dict[str, Any]:
    members = {f"{architecture}.{name}": value for name, value in own.items()}
    return {"general.architecture": architecture, "general.name": "tiny", **members}


def tiny_recurrent_model(path: Path, *, n_ctx: int = 4096, seed: int = 1) -> Path:
    """A Mamba of two layers: it keeps one state for each sequence, which cannot be cut."""
    own = {
        "block_count": N_LAYER, "context_length": n_ctx, "embedding_length": N_EMBD, "feed_forward_length": 0,
        "attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5, "ssm.conv_kernel": D_CONV,
        "ssm.inner_size": D_INNER, "ssm.state_size": D_STATE, "ssm.time_step_rank": DT_RANK,
    }  # fmt: skip
    vocabulary = tiny_vocabulary("llama")
    metadata = _named("mamba", own) | vocabulary | {"tokenizer.chat_template": TEMPLATE}
    tensors, matrix = _both_ends(len(vocabulary["tokenizer.ggml.tokens"]), seed)
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


def tiny_lora(
    path: Path,
    *,
    seed: int = 7,
    rank: int = 4,
    scale: float = 0.7,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
) -> Path:
    """A LoRA adapter of `tiny_model`: it changes the queries, values and outputs of each layer. scale: of its numbers.

    metadata, tensors: in place of its own. An empty tensor removes one.
    """
    random = np.random.default_rng(seed)
    kv = N_EMBD * N_HEAD_KV // N_HEAD
    own: dict[str, np.ndarray[Any, Any]] = {}
    for layer in range(N_LAYER):
        for name, outer in (("attn_q", N_EMBD), ("attn_v", kv), ("attn_output", N_EMBD)):
            own[f"blk.{layer}.{name}.weight.lora_a"] = random.normal(0, scale, (rank, N_EMBD)) / N_EMBD**0.5
            own[f"blk.{layer}.{name}.weight.lora_b"] = random.normal(0, scale, (outer, rank))
    about = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(rank)}
    return write_gguf(path, about | dict(metadata), {name: t for name, t in (own | dict(tensors)).items() if t.size})


def tiny_vocabulary(model: str, pre: str | None = None) -> dict[str, Any]:
    """The smallest one of each kind that llama.cpp reads, with a token for each byte or each character of ASCII.

    model: `tokenizer.ggml.model`. pre: `tokenizer.ggml.pre`, for the models with merges.
    """
    words = ["\u2581", "a", "aa", "!", "!!"]
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
    tokens = [*_MARKS, *byte_tokens, *words]
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


def _both_ends(n_vocab: int, seed: int) -> tuple[dict[str, np.ndarray[Any, Any]], Callable[..., np.ndarray[Any, Any]]]:
    """What every model has beside its layers, and what makes further weights."""
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return random.normal(0, shape[-1] ** -0.5, shape)

    tensors = {"token_embd.weight": random.normal(0, 1, (n_vocab, N_EMBD)), "output_norm.weight": np.ones(N_EMBD)}
    return tensors | {"output.weight": 4 * matrix(n_vocab, N_EMBD)}, matrix


def _weights(n_vocab: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    tensors, matrix = _both_ends(n_vocab, seed)
    kv = N_EMBD * N_HEAD_KV // N_HEAD
    shapes = {
        "attn_q": (N_EMBD, N_EMBD), "attn_k": (kv, N_EMBD), "attn_v": (kv, N_EMBD), "attn_output": (N_EMBD, N_EMBD),
        "ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF),
    }  # fmt: skip
    for layer in range(N_LAYER):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{norm}.weight"] = np.ones(N_EMBD)
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = matrix(*shape)
    return tensors
