"""The pre-tokenizers of the locked llama.cpp, by what a model's file calls them, and texts that are hard on them."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.3.36"  # of llama-cpp-python: with another one, list anew what `llama_vocab::impl::load` compares with

PRE_TOKENIZERS: Final = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
    deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4
    gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2
    hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
    joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0
    minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
    seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka
    viking whitespace youtu
""".split()  # noqa: SIM905 - a list of 91 lines is read by nobody

# Those that read the text as it is. Their vocabularies are not spelled in GPT-2's printable characters.
UNSPELLED: Final = frozenset({"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"})

# `tokenizer.ggml.model`, and the pre-tokenizer where one is needed.
MODELS: Final = ("llama", "gpt2", "gemma4", "whitespace", "hybriddna", "bert", "t5", "rwkv", "plamo2")

_UNITS: Final = ("!", "a", "A", " ", "\n", "\t", "1", "é", "漢", "😀", "\u0301", "a\u0301", "aA1! ", "a ", "'s", "1,", " \n")


def hard_texts(length: int) -> list[str]:
    """Long runs, each of so many characters: of one, of some in turn, and of one before another kind."""
    return [*(unit * (length // len(unit)) for unit in _UNITS), " " * length + "x", "1" * length + "a"]
