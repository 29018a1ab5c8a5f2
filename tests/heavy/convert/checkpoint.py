"""Writes the default model as a checkpoint of Hugging Face: python checkpoint.py MODEL.gguf FOLDER. It needs no PyTorch.

The weights become 16-bit floats in safetensors. GGUF has the rows of `attn_q` and `attn_k` in another order, which is undone.
The tokenizer is rebuilt from the vocabulary: byte-level BPE, digits one by one, as SmolLM2's own is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

CONTROL: Final = 3  # GGUF's type of a token that is no text
_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Source:
    """A GGUF file's metadata and weights."""

    def __init__(self, path: str) -> None:
        self.reader = gguf.GGUFReader(path)

    def value(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def weights(self) -> dict[str, NDArray[np.float16]]:
        heads = {"attn_q": self.value("llama.attention.head_count"), "attn_k": self.value("llama.attention.head_count_kv")}
        found = {}
        for tensor in self.reader.tensors:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
            part = tensor.name.removesuffix(".weight").split(".")[-1]
            found[_name(tensor.name)] = np.ascontiguousarray(_unpermuted(data, heads[part]) if part in heads else data)
        return found


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _unpermuted(data: NDArray[np.float16], heads: int) -> NDArray[np.float16]:
    """ggml rotates neighbouring rows of a head together, and transformers those of its two halves."""
    rows, columns = data.shape
    return data.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def config(source: Source, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "hidden_size": source.value("llama.embedding_length"),
        "intermediate_size": source.value("llama.feed_forward_length"),
        "num_hidden_layers": source.value("llama.block_count"),
        "num_attention_heads": source.value("llama.attention.head_count"),
        "num_key_value_heads": source.value("llama.attention.head_count_kv"),
        "max_position_embeddings": source.value("llama.context_length"),
        "rms_norm_eps": source.value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": source.value("llama.rope.freq_base"),
        "vocab_size": len(source.value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "bos_token_id": source.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.value("tokenizer.ggml.eos_token_id"),
    }


def tokenizer(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json."""
    tokens, kinds = source.value("tokenizer.ggml.tokens"), source.value("tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    controls = [(i, token) for i, token in enumerate(tokens) if kinds[i] == CONTROL]
    added = [{"id": i, "content": token} | plain for i, token in controls]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in source.value("tokenizer.ggml.merges")],
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[source.value("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[source.value("tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[source.value("tokenizer.ggml.unknown_token_id")],
        "chat_template": source.value("tokenizer.chat_template"),
    }
    return whole, about


def main(model: str, folder: str) -> None:
    source, out = Source(model), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    weights = source.weights()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    whole, about = tokenizer(source)
    tied = "lm_head.weight" not in weights
    written = {"config.json": config(source, tied), "tokenizer.json": whole, "tokenizer_config.json": about}
    for name, value in written.items():
        (out / name).write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
