"""What transformers makes of some texts: token ids, and logits. A program that the converter's environment runs, without Lacre.

    python reference.py OUT.npz    with a question as JSON on stdin: {"folder": …, "adapter": …, "texts": […], "logits": true}

OUT.npz gets `ids_N` (int64, the text's length) and `logits_N` (float32, length by vocabulary) for each text, and `untold`:
why there are no logits; empty if there are. adapter: a folder of PEFT that is applied to the model, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def tokens(folder: str, texts: list[str], trust: bool) -> list[list[int]]:
    """No special token is added."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - there is none where Lacre is

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    return [list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]


def logits(folder: str, adapter: str | None, ids: list[list[int]], trust: bool) -> list[Any]:
    """In 32 bits, at every position."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=trust, use_safetensors=True
    ).eval()
    if adapter is not None:
        from peft import PeftModel  # noqa: PLC0415

        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        return [model(torch.tensor([each])).logits[0].float().numpy() for each in ids]


def main(out: Path) -> None:
    asked = json.load(sys.stdin)
    folder, trust = asked["folder"], asked["trust"]
    ids = tokens(folder, asked["texts"], trust)
    found, untold = [], "" if asked["logits"] else "transformers would need more memory than is free"
    if asked["logits"]:
        try:
            found = logits(folder, asked.get("adapter"), ids, trust)
        except Exception as exc:  # noqa: BLE001 - of a library that raises anything; the answer says that nothing was compared
            untold = f"transformers cannot run this model: {type(exc).__name__}: {str(exc).strip()[:200]}"
    arrays = {f"ids_{i}": np.array(each, dtype=np.int64) for i, each in enumerate(ids)}
    arrays |= {f"logits_{i}": np.asarray(each, dtype=np.float32) for i, each in enumerate(found)}
    np.savez(out, allow_pickle=False, untold=np.array(untold), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
