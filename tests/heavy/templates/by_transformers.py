"""Renders chat templates with transformers' own `apply_chat_template`; runs in the suite's environment.

In, on stdin: a JSON list of {template, bos_token, eos_token, messages, tools, add_generation_prompt}. Out: a list of {"text"}
or {"refused"}, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def rendered(case: dict[str, Any]) -> dict[str, str]:
    words, given = models.WordLevel({"?": 0}, unk_token="?"), {name: case[name] for name in ("tools", "add_generation_prompt")}
    tokens = {name: case[name] for name in ("bos_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), chat_template=case["template"], **tokens)
    try:
        text = tokenizer.apply_chat_template(case["messages"], tokenize=False, **given)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"text": text}


if __name__ == "__main__":
    json.dump([rendered(case) for case in json.load(sys.stdin)], sys.stdout)
